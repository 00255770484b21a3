"""What the four systems share; knows none of them."""
