"""Constants that every implementation of the gradient sum shares."""

BLOCK = 64  # columns that share a step
LEAST_EXPONENT, LARGEST_EXPONENT = -126, 121  # the step and its inverse are normal float32 numbers
EXPONENT_OFFSET = 133  # of float32's exponent field above that of a step of which 64 to 127 make the number
BEYOND_127 = 0x7E0000  # a fraction above this makes it more than 127 steps
