"""What scripts share, and the command `arb` that runs them."""
