// Few rows against the decode layout, streamed once: what batch-1 generation spends its time on.
#pragma once

#include "common.h"

constexpr int64_t MATVEC_ROWS = 8;  // at most

// rows int8 (R, 16 * chunks), zeros behind K; layout: per 16 columns, chunks of 64 or, with two trits a weight, 128
// bytes (decode_layout.py).
void layout_matvec(int isa, int trits, const int8_t* rows, const uint8_t* layout, int64_t R, int64_t C, int64_t chunks,
                   const int32_t* row_sums, const float* row_scale, const float* column_scale, float* out);
