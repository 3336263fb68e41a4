"""The audit of persistent state, and measured and forecast memory of a training step."""
