"""Kernels of optional blocks: LSTM gates, the sigmoid, n-gram hashes, edge routing."""
