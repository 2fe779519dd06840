"""µP: coordinate check, transfer sweep, updates through a growth, loss prediction."""
