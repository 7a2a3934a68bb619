"""Profiles in files: a header in JSON, and moments in safetensors files that are read one at a time."""
