"""Runs: a chain of stages, its training loop, growth on disk, and the report."""
