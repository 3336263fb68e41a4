// Version of the C ABI: raised with any change of a signature, so that a stale build is not called.
#include "common.h"

ARB_API int arb_abi_version() { return 1; }
