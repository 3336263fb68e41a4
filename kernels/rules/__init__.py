"""The update rules: momentum, flip, correlation, momentum of table rows, and the sum of micro-batches."""
