"""Supervised fine-tuning: chat samples, selection, training, and scores."""
