"""Where weights and deltas live. This room sees files and parameters, never a Hessian or a rule."""
