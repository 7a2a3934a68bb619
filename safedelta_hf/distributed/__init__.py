"""The processes of a run, and how each backend holds a model's parameters."""
