"""What every script does with its arguments and errors."""
