"""Checks and benchmarks for developers."""
