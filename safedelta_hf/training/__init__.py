"""Defences while training and in the training data, around any Trainer."""
