// The version of the C ABI that Python checks, so that a stale build is not called; and memory advice.
#include "common.h"

#ifdef __linux__
#include <sys/mman.h>
#endif

ARB_API int arb_abi_version() { return native_library::ABI_VERSION; }

// Ask for huge pages in [data, data + bytes), both multiples of the page size. Only advice: nothing depends on it.
ARB_API void arb_advise_huge_pages(void* data, int64_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
    madvise(data, bytes, MADV_HUGEPAGE);
#endif
}
