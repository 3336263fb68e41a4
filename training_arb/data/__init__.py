"""Text files, documents, streams, mixtures and conversations as blocks of bytes."""
