"""The version of the package: the one place that states it (setup.py reads this file)."""

__version__ = "0.2.0"
