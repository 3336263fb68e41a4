"""Helpers without a subject of their own: atomic files, text tables, device names, threads."""
