"""Growth: check operators, compare them by training, draw them, grow a checkpoint on disk."""
