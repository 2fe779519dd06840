"""Speed of the train step and of generation."""
