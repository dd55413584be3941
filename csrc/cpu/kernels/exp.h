// exp and tanh of vectors, accurate to an ulp or two whatever else the instruction set has.
#pragma once

#include "cpu/kernels/vec.h"

namespace gfast {
namespace GFAST_ISA_NS {
namespace {

// x = n ln 2 + r with |r| <= ln(2)/2 (a hair more without fma); `power` holds n in its low bits.
struct Reduced {
  vf r;
  vi power;
};

GFAST_INLINE Reduced reduce_ln2(vf x) {
  const vf shift = splat(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer, kept in the low mantissa bits
  const vf t = x * 1.44269504089f + shift;
  const vf n = t - shift;
#if defined(__FMA__) || defined(__aarch64__)
  const vf r = x - n * 0x1.62e430p-1f;  // an fma: the error is n times 2e-9, the rounding of ln(2)
#else
  vf r = x - n * 0.693359375f;  // exact: the constant has 9 significant bits
  r = r - n * -2.12194440e-4f;
#endif
  return {r, (vi)t};
}

// (exp(r) - 1 - r) / r^2, relative error of 1 + r + r^2 q(r) below 4e-9 for |r| <= ln(2)/2.
GFAST_INLINE vf exp_tail(vf r) {
  vf q = splat(0x1.6a1a72p-10f);
  q = q * r + 0x1.123fc6p-7f;
  q = q * r + 0x1.555916p-5f;
  q = q * r + 0x1.55548ap-3f;
  return q * r + 0x1.fffffcp-2f;
}

// exp(x) for x <= 80, within 1 ulp near 0 and 2 ulp far from it; below -87.3, where the result is subnormal, it is 0, also for
// -inf; NaN stays NaN.
GFAST_INLINE vf exp(vf x) {
  const Reduced reduced = reduce_ln2(x);
  const vf r = reduced.r;
  const vf y = (exp_tail(r) * r + 1.0f) * r + 1.0f;
  const vu scaled = (vu)y + ((vu)reduced.power << 23);  // wraps where x is far off, and is not taken then
  return (vf)(x < -87.3f ? vu{} : scaled);
}

struct Tanh {
  vf value;
  vf slope;  // 1 - value^2 without cancellation
};

// tanh(x) = -e / (2 + e) sign(x) with e = expm1(-2|x|), so small |x| keep their relative accuracy. About 1 ulp, because
// softcap multiplies what is left: the roundings of e and of 2 + e are carried along and put right after the division, or,
// where products cannot be had exactly (no fma), doubles are used.
GFAST_INLINE Tanh tanh(vf x) {
  const vi sign = (vi)x & INT32_MIN;
  vf a = (vf)((vi)x ^ sign);
  a = a > 43.0f ? splat(43.0f) : a;
  const Reduced reduced = reduce_ln2(-2.0f * a);
  const vf r = reduced.r;
  const vf power = (vf)(((vu)reduced.power + 127u) << 23);  // 2^n, n in [-125, 0]
  const vf tail = rounded((r * r) * exp_tail(r));
#if defined(__FMA__) || defined(__aarch64__)
  const vf small = rounded(r + tail);  // expm1(r)
  const vf small_rest = tail - (small - r);
  const vf whole = power - 1.0f, fraction = power * small;
  const vf e = rounded(whole + fraction);
  const vf from_whole = rounded(e - whole);  // two-sum: either part may be the larger
  const vf e_rest = (whole - rounded(e - from_whole)) + (fraction - from_whole) + power * small_rest;
  const vf bottom = rounded(2.0f + e);
  const vf bottom_rest = (e - (bottom - 2.0f)) + e_rest;
  const vf inverse = 1.0f / bottom;
  const vf guess = rounded(-e * inverse);
  const vf miss = (-e - guess * bottom) - e_rest - guess * bottom_rest;
  const vf value = guess + miss * inverse;
#else
  const vd wide_power = __builtin_convertvector(power, vd);
  const vd e = wide_power * (__builtin_convertvector(r, vd) + __builtin_convertvector(tail, vd)) + (wide_power - 1.0);
  const vf value = __builtin_convertvector(-e / (2.0 + e), vf);
  const vf inverse = __builtin_convertvector(1.0 / (2.0 + e), vf);
#endif
  const vf u = power * (r + tail) + power;  // exp(-2|x|)
  return {(vf)((vi)value | sign), 4.0f * u * inverse * inverse};
}

}  // namespace
}  // namespace GFAST_ISA_NS
}  // namespace gfast
