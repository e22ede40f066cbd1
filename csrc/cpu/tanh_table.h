// tanh by table, where a vector register can be one: 16 of these 32 numbers each. Coefficients: tools/coefficients.py.
#pragma once

#include "vector.h"

namespace fastact {
namespace FASTACT_NAMESPACE {
namespace {

#if defined(__x86_64__) && FASTACT_VECTOR_BYTES == 64

/// tanh a = c0 + c1 (a - m) + ... + c4 (a - m)^4 in each of 32 intervals of a + 0.625, eight to a power of two. The rows are m,
/// c0,
/// ..., c4; the columns are numbered by the low bits of what that sum has for its exponent and the first three of its fraction.
alignas(64) constexpr float kTanhTable[6][32] = {
    {0x1.7ff6fep+0f, 0x1.bfb8bap+0f, 0x1.000418p+1f, 0x1.200d1cp+1f, 0x1.402196p+1f, 0x1.5fbac8p+1f, 0x1.7fd4fep+1f,
     0x1.a04746p+1f, 0x1.d04d02p+1f, 0x1.076e98p+2f, 0x1.281894p+2f, 0x1.480276p+2f, 0x1.67f5c2p+2f, 0x1.87e978p+2f,
     0x1.a80902p+2f, 0x1.c79d4ap+2f, 0x1.f70ffap+2f, 0x1.15624ep+3f, 0x0p+0f,        0x1.8089ap-4f,  0x1.404816p-3f,
     0x1.bf367ap-3f, 0x1.204674p-2f, 0x1.5ff8ap-2f,  0x1.c0d1b8p-2f, 0x1.1f096cp-1f, 0x1.5ffa44p-1f, 0x1.a01894p-1f,
     0x1.e013aap-1f, 0x1.101d7ep+0f, 0x1.2ff42p+0f,  0x1.4f5d64p+0f},
    {0x1.cf6c56p-1f, 0x1.e1ebbcp-1f, 0x1.ed962ep-1f, 0x1.f4c21ep-1f, 0x1.f92914p-1f, 0x1.fbd08ap-1f, 0x1.fd761ep-1f,
     0x1.fe782ep-1f, 0x1.ff46d6p-1f, 0x1.ffba4ep-1f, 0x1.ffe6e2p-1f, 0x1.fff6bcp-1f, 0x1.fffc96p-1f, 0x1.fffebep-1f,
     0x1.ffff8ap-1f, 0x1.ffffd4p-1f, 0x1.fffff6p-1f, 0x1.fffffep-1f, 0x0p+0f,        0x1.7f696ep-4f, 0x1.3db222p-3f,
     0x1.b83cd2p-3f, 0x1.18e4c2p-2f, 0x1.52bc34p-2f, 0x1.a620c2p-2f, 0x1.0451c6p-1f, 0x1.31542ep-1f, 0x1.579682p-1f,
     0x1.77e14ap-1f, 0x1.92d62ep-1f, 0x1.a8d466p-1f, 0x1.ba82eep-1f},
    {0x1.722e0ap-3f,  0x1.d320eap-4f,  0x1.215088p-4f,  0x1.63c894p-5f,  0x1.b2cd8ep-6f, 0x1.0ac496p-6f,  0x1.4421fcp-7f,
     0x1.873afcp-8f,  0x1.72003ap-9f,  0x1.16a898p-10f, 0x1.91c3d8p-12f, 0x1.28703p-13f, 0x1.b4e958p-15f, 0x1.41f338p-16f,
     0x1.d7ef62p-18f, 0x1.5fd482p-19f, 0x1.3eacbep-21f, 0x1.03bf38p-23f, 0x1p+0f,        0x1.fb8386p-1f,  0x1.f3adeap-1f,
     0x1.e85776p-1f,  0x1.d97958p-1f,  0x1.c7f95p-1f,   0x1.a8fep-1f,    0x1.7ba4eep-1f, 0x1.49eb32p-1f,  0x1.196db6p-1f,
     0x1.d81a44p-2f,  0x1.861ab2p-2f,  0x1.3effc6p-2f,  0x1.0317a4p-2f},
    {-0x1.4f0ee2p-3f, -0x1.b7afdap-4f,  -0x1.16e94cp-4f,  -0x1.5bf96ap-5f,  -0x1.acff9p-6f,   -0x1.0896ecp-6f,
     -0x1.42874ep-7f, -0x1.86109ap-8f,  -0x1.718a2cp-9f,  -0x1.168e48p-10f, -0x1.91c14cp-12f, -0x1.28773cp-13f,
     -0x1.b4f88p-15f, -0x1.41ff96p-16f, -0x1.d802dep-18f, -0x1.5fe288p-19f, -0x1.3f79fap-21f, -0x1.0119fcp-23f,
     0x1.8edca2p-18f, -0x1.7c0dd8p-4f,  -0x1.360d2p-3f,   -0x1.a3e53ap-3f,  -0x1.03c1ecp-2f,  -0x1.2dab32p-2f,
     -0x1.5e6482p-2f, -0x1.820caap-2f,  -0x1.897d94p-2f,  -0x1.79b758p-2f,  -0x1.5a96e4p-2f,  -0x1.32ee18p-2f,
     -0x1.08b01ep-2f, -0x1.bfdb4cp-3f},
    {0x1.67823p-4f,   0x1.0272fap-4f,  0x1.59a71p-5f,   0x1.bcc67p-6f,   0x1.1745f6p-6f,  0x1.5c408cp-7f,  0x1.ab577ap-8f,
     0x1.03834ap-8f,  0x1.f35052p-10f, 0x1.7902c8p-11f, 0x1.101fc4p-12f, 0x1.91a6b8p-14f, 0x1.2800b2p-15f, 0x1.b43704p-17f,
     0x1.3fcdd2p-18f, 0x1.dca598p-20f, 0x1.c5437ep-22f, 0x1.954abp-25f,  -0x1.55eccp-2f,  -0x1.4944c2p-2f, -0x1.34ec7cp-2f,
     -0x1.1851f2p-2f, -0x1.e8a1bap-3f, -0x1.984c84p-3f, -0x1.15d63cp-3f, -0x1.c851e6p-5f, 0x1.ccaa6p-7f,   0x1.06211p-4f,
     0x1.83386p-4f,   0x1.bd020cp-4f,  0x1.c4a588p-4f,  0x1.ac6554p-4f},
    {-0x1.9782eap-6f,  -0x1.8136b6p-6f,  -0x1.25106ep-6f,  -0x1.93c19p-7f,   -0x1.077e4ap-7f, -0x1.4ff70ap-8f, -0x1.a1d744p-9f,
     -0x1.ff8ac6p-10f, -0x1.eba5a4p-11f, -0x1.7498b8p-12f, -0x1.0d471ap-13f, -0x1.8daf1p-15f, -0x1.25261p-16f, -0x1.b00fb6p-18f,
     -0x1.3cb836p-19f, -0x1.d82976p-21f, -0x1.b4df48p-23f, 0x1.759a9cp-27f,  0x1.0591ep-6f,   0x1.fa0076p-5f,  0x1.8fcb8cp-4f,
     0x1.04d1b8p-3f,   0x1.33598ap-3f,   0x1.502e4ep-3f,   0x1.5b9d32p-3f,   0x1.3aa3d2p-3f,  0x1.e8e09ep-4f,  0x1.4683b6p-4f,
     0x1.61f576p-5f,   0x1.d4747ep-7f,   -0x1.6f5d5ep-8f,  -0x1.1f3a7p-6f}};

/// Max error 1.31 ULP. Beside c0, which is exact, the other terms are small, so that one rounding counts.
FASTACT_FN Float tanh_nonnegative(Float a) {
  constexpr float shift = 0.625f, one = 9.25f;  // tanh 9.25 rounds to 1
  a = min(Float(one), a);
  const __m512i piece = _mm512_srli_epi32((__m512i)(a + shift).raw, 20);
  const auto of_piece = [&](int row) __attribute__((always_inline)) {
    return Float(_mm512_permutex2var_ps(_mm512_load_ps(kTanhTable[row]), piece, _mm512_load_ps(kTanhTable[row] + 16)));
  };
  const Float r = a - of_piece(0);
  Float y = of_piece(5);
#pragma GCC unroll 4
  for (int row = 4; row > 0; --row) y = fma(y, r, of_piece(row));
  return y;
}

#endif

}  // namespace
}  // namespace FASTACT_NAMESPACE
}  // namespace fastact
