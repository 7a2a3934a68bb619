"""Adjust an adapter, in memory or in files."""
