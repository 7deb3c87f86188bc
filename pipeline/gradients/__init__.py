"""Gradient statistics: pure formulas in statistics.py, and one file per way to see a gradient."""
