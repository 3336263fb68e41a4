"""Bits per byte of any causal model, and lm-evaluation-harness tasks."""
