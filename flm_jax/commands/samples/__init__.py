"""Chat samples: make them, select from them."""
