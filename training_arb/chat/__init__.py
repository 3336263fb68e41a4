"""Text generation and chat in a terminal."""
