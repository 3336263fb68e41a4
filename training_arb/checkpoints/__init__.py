"""Checkpoints of a run: files, checksums, sources, and starting a run from one."""
