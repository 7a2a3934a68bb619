"""The safety profile, in memory and on disk."""
