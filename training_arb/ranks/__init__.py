"""Several processes that train one model: exchange of gradients and states, loss of a process."""
