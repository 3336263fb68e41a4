"""Checks of a checkpoint before it is loaded, and the code that is saved beside it."""
