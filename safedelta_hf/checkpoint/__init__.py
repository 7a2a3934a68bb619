"""Adjust a model in files, one weight at a time."""
