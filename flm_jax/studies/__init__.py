"""What the project measures of itself: growth operators, µP, loss prediction."""
