"""What generation needs beside transformers' own: cache layers, contrastive search."""
