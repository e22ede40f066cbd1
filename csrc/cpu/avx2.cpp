// The kernels for CPUs with AVX2, FMA and F16C.
#if defined(__x86_64__)
#pragma GCC target("avx2,fma,f16c,bmi,bmi2,prfchw")
#define FASTACT_NAMESPACE avx2
#define FASTACT_ISA "avx2"
#define FASTACT_VECTOR_BYTES 32
#include "table.h"
#endif
