"""The Trainer's side: when to act, on which weights, and whom to tell. No tensor mathematics."""
