// Packed rows to int8 levels (packing.py).
#include "trits.h"

#include <vector>

namespace {

ARB_CLONES void unpack(const uint8_t* packed, int64_t width, int trits, int8_t* levels, int8_t* plane) {
    unpack_levels(packed, width, trits, levels, plane);
}

}  // namespace

// packed (rows, trits * ceil(columns / 5)), trits 1 or 2 -> levels int8 (rows, columns)
ARB_API void arb_unpack_levels(const uint8_t* packed, int64_t rows, int64_t columns, int trits, int8_t* levels) {
    const int64_t width = packed_width(columns), padded = packing::TRITS_PER_BYTE * width;
#pragma omp parallel if (rows * columns >= PARALLEL_FROM)
    {
        std::vector<int8_t> row(padded), plane(padded);
#pragma omp for
        for (int64_t n = 0; n < rows; ++n) {
            unpack(packed + n * trits * width, width, trits, row.data(), plane.data());
            memcpy(levels + n * columns, row.data(), columns);
        }
    }
}
