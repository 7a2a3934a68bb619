"""The forms that a delta has: dense, sharded, of low rank, in layers and in files of an adapter."""
