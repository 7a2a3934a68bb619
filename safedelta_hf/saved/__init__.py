"""What a folder holds, a model or an adapter: all of an adjustment in one call."""
