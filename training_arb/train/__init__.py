"""Trainer and its arguments, signals, divergence, progress."""
