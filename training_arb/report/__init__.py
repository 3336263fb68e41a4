"""Facts and curves of a run, as JSON, plots and HTML."""
