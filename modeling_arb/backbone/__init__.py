"""What every model has: byte embedding, attention, MLP, head."""
