"""Export to the hub: files, model card, upload."""
