"""How integers lie in memory: packed trits, exponents, groups, the tensors of each update rule."""
