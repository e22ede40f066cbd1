// The kernels for CPUs with AVX-512 F, BW, DQ and VL.
#if defined(__x86_64__)
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c,bmi,bmi2,prfchw,prefer-vector-width=512")
#define FASTACT_NAMESPACE avx512
#define FASTACT_ISA "avx512"
#define FASTACT_VECTOR_BYTES 64
#include "table.h"
#endif
