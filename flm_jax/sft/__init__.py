"""Supervised fine-tuning: chat samples, their choice, training on them, and scores."""
