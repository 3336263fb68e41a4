"""What developers run: checks and benchmarks of single promises."""
