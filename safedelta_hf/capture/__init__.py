"""Which layers, what they read while the base model sees the safety data, and the profile that holds it."""
