"""What torch modules call their parameters and hold in them."""
