// The kernels for every CPU: SSE2 on x86-64, what the compiler's default offers elsewhere.
#define FASTACT_NAMESPACE baseline
#define FASTACT_ISA "baseline"
#define FASTACT_VECTOR_BYTES 16
#include "table.h"
