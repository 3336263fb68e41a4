// Packed rows to int8 (packing.py).
#include "trits.h"

#include <vector>

namespace {

ARB_CLONES void unpack(const uint8_t* packed, int64_t width, int8_t* trits) { unpack_row(packed, width, trits); }

}  // namespace

// packed (rows, ceil(columns / 5)) -> trits int8 (rows, columns)
ARB_API void arb_unpack_trits(const uint8_t* packed, int64_t rows, int64_t columns, int8_t* trits) {
    const int64_t width = packed_width(columns);
#pragma omp parallel if (rows * columns >= PARALLEL_FROM)
    {
        std::vector<int8_t> padded(packing::TRITS_PER_BYTE * width);
#pragma omp for
        for (int64_t n = 0; n < rows; ++n) {
            unpack(packed + n * width, width, padded.data());
            memcpy(trits + n * columns, padded.data(), columns);
        }
    }
}
