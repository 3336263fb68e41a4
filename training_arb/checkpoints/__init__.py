"""A run's checkpoints: files, checksums, where they come from, starting a run from one."""
