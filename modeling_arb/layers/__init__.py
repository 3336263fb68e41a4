"""Ternary matrices, embeddings and tables as modules, with the integer state that they keep."""
