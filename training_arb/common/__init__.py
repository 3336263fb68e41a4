"""General helpers: atomic files, text tables, device names, error lines, threads."""
