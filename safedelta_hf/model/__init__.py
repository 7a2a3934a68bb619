"""Adjust a model in memory."""
