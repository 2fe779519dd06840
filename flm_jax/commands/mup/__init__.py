"""µP: coordinate check, sweep, growth, loss prediction."""
