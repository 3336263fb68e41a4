"""The integer optimizer, and the update rules that it applies to matrices and tables."""
