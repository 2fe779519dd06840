"""Chat samples: make them, select a small set of them."""
