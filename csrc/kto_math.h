// Scalar mathematics of the loss head, shared by the CPU kernels and (as __host__ __device__) by CUDA.
//
// Written without branches and without libm calls, so that compilers vectorise loops over it, and
// compiled without fused multiply-add, so that every instruction set gives the same bits.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#if defined(__CUDACC__)
#define KTO_INLINE __host__ __device__ __forceinline__
#else
#define KTO_INLINE inline __attribute__((always_inline))
#endif

namespace stepkto {

// z = cap(logit_scale * (x + bias)) / temperature, cap(x) = softcap * tanh(x / softcap).
struct LogitOptions {
  float temperature;
  float logit_scale;
  float softcap;  // 0: no cap
};

// exp(x), at most 1.5 ulp off for x in [-87.3, 88.7] (tests/test_native.py); 0 below, NaN for NaN.
//
// exp(x) = 2^k * exp(r), k = round(x / ln 2), |r| <= ln 2 / 2; exp(r) by its Taylor polynomial of
// degree 7, whose remainder is 2.3e-9 relative at the ends of the interval.
KTO_INLINE float exp_fp32(float x) {
  const float lowest = -87.33654f;  // ln of the smallest normal number
  const float highest = 88.72283f;  // ln of the largest number
  float c = x < lowest ? lowest : x;
  c = c > highest ? highest : c;
  const float shift = 12582912.0f;  // 1.5 * 2^23: adding it leaves k in the low bits
  const float shifted = c * 1.44269504088896341f + shift;
  const float k = shifted - shift;
  // ln 2 in two parts, the first with few enough bits for k * 0.693359375f to be exact
  const float r = (c - k * 0.693359375f) - k * -2.12194440e-4f;
  float p = 1.0f / 5040.0f;
  p = p * r + 1.0f / 720.0f;
  p = p * r + 1.0f / 120.0f;
  p = p * r + 1.0f / 24.0f;
  p = p * r + 1.0f / 6.0f;
  p = p * r + 0.5f;
  p = (p * r) * r + r;  // exp(r) - 1, small, so that the sum below rounds once
  p = p + 1.0f;
  // 2^k in two factors: k = 128 alone has no fp32
  int32_t bits;
  std::memcpy(&bits, &shifted, sizeof bits);
  const int32_t power = bits - 0x4B400000;  // k
  const int32_t half = power >> 1;
  // unsigned, as a NaN's k would shift bits out, which signed numbers leave undefined
  const uint32_t first_bits = static_cast<uint32_t>(half + 127) << 23;
  const uint32_t second_bits = static_cast<uint32_t>(power - half + 127) << 23;
  float first, second;
  std::memcpy(&first, &first_bits, sizeof first);
  std::memcpy(&second, &second_bits, sizeof second);
  const float y = (p * first) * second;
  return x < lowest ? 0.0f : y;
}

// tanh(x), at most 3 ulp off. An odd polynomial near 0, where 1 - 2 / (exp(2|x|) + 1) would cancel.
KTO_INLINE float tanh_fp32(float x) {
  const float a = x < 0.0f ? -x : x;
  const float s = x * x;
  // minimax polynomial of Cephes' tanhf on |x| < 0.625
  float p = -5.70498872745e-3f;
  p = p * s + 2.06390887954e-2f;
  p = p * s + -5.37397155531e-2f;
  p = p * s + 1.33314422036e-1f;
  p = p * s + -3.33332819422e-1f;
  const float near = p * s * x + x;
  const float limited = a > 20.0f ? 20.0f : a;  // tanh is 1 in fp32 from 9.1 on
  const float tail = 1.0f - 2.0f / (exp_fp32(2.0f * limited) + 1.0f);
  const float far = x < 0.0f ? -tail : tail;
  return a < 0.625f ? near : far;
}

// d cap / d (its argument) of a transformed logit z: 1 - tanh^2; 0 where tanh rounded to 1, of which
// z may have lost the last bit.
KTO_INLINE float cap_slope(float z, LogitOptions o) {
  const float t = z * (o.temperature / o.softcap);
  const float a = z < 0.0f ? -z : z;
  return a >= o.softcap / o.temperature ? 0.0f : 1.0f - t * t;
}

// What a term is divided by, where there may be nothing to divide. NaN stays NaN.
KTO_INLINE double divisor(double n) { return n <= 0 ? 1.0 : n; }

// Options of one level of the loss; z is its reference point.
struct KtoLevel {
  double z, beta, desirable, undesirable;
};

struct KtoTerm {
  double value;  // l = lam * sigmoid(-u)
  double slope;  // d l / d r = -lam * sign * beta * sigmoid(u) * sigmoid(-u)
  double u;      // sign * beta * (r - z)
};

// KTO loss of a segment with log-ratio r. Nothing cancels: sigmoid(-u) is not 1 - sigmoid(u).
KTO_INLINE KtoTerm kto_term(double r, int label, KtoLevel level) {
  if (label < 0) return {0.0, 0.0, 0.0};
  const double sign = label > 0 ? 1.0 : -1.0;
  const double lam = label > 0 ? level.desirable : level.undesirable;
  const double u = sign * level.beta * (r - level.z);
  const double wrongness = 1.0 / (1.0 + exp(u));
  const double rightness = 1.0 / (1.0 + exp(-u));
  return {lam * wrongness, -lam * sign * level.beta * rightness * wrongness, u};
}

}  // namespace stepkto
