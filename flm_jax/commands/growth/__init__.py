"""Growth operators: check, compare, draw; grow a checkpoint on disk."""
