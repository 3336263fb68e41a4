"""Benchmarks: what is measured, against whom, and how rows are reported."""
