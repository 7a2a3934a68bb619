"""Polishing an adjusted model: a few steps of distillation from its base and its fine-tune."""
