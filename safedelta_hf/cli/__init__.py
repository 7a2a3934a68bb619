"""Command line: parses and delegates."""
