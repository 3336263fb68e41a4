#pragma once

#include "common.h"

// One token's values to int8 codes; returns their scale.
float quantise_row(const float* row, int64_t length, int8_t* codes);
