"""Sink: looks at the gradients that matrices and tables hand over."""


class Sink:
    """Calls keep(matrix, dW), or keep(table, row_ids, dW), for each gradient, then hands it to the next sink if any."""

    def __init__(self, keep, then=None):
        self.keep, self.then = keep, then

    def dense(self, matrix, dW, used=None):
        if used is None or used:
            self.keep(matrix, dW)
        if self.then:
            self.then.dense(matrix, dW, used)

    def rows(self, table, row_ids, dW):
        self.keep(table, row_ids, dW)
        if self.then:
            self.then.rows(table, row_ids, dW)
