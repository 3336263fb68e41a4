"""Optional blocks, each built only where the config has settings for it."""
