"""Plain, frozen values that flow between rooms, without tensors."""
