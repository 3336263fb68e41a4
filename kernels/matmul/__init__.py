"""Quantisation of activations and gradients, and the int8 matmuls of training and decoding."""
