"""Tests of kernels and training on a GPU, with nothing installed but torch, triton and transformers."""
