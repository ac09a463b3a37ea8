// Row kernels over one tile of logits: running log-sum-exp, statistics, dlogits in place.
//
// A row is worked through in strips that stay in the first-level cache. Loops over a strip are plain
// C++ that the compiler vectorises; KTO_CLONES makes an AVX-512, an AVX2 and a portable copy and picks
// one when the library is loaded. Reductions go into LANES partial results in every copy, so all of
// them give the same bits, and a row's bits do not depend on the other rows or on the threads.

#include "rows_cpu.h"

#include <cfloat>
#include <cmath>

#if defined(KTO_CLONES)  // empty, for one copy by the compiler's own options
#elif defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define KTO_CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define KTO_CLONES
#endif

namespace stepkto {
namespace {

constexpr int LANES = 32;
constexpr int STRIP = 2048;  // columns, 8 KiB of fp32: a row of a tile of plan.py is one strip

// z of `count` columns into buf, padded with -inf up to a multiple of LANES. Returns that multiple.
inline __attribute__((always_inline)) int load_strip(
    const float* x, const float* bias, int count, LogitOptions o, float* buf) {
  for (int j = 0; j < count; ++j) buf[j] = x[j];
  if (bias != nullptr)
    for (int j = 0; j < count; ++j) buf[j] += bias[j];
  if (o.logit_scale != 1.0f)
    for (int j = 0; j < count; ++j) buf[j] *= o.logit_scale;
  if (o.softcap != 0.0f)
    for (int j = 0; j < count; ++j) buf[j] = tanh_fp32(buf[j] / o.softcap) * o.softcap;
  if (o.temperature != 1.0f)
    for (int j = 0; j < count; ++j) buf[j] /= o.temperature;
  const int padded = (count + LANES - 1) / LANES * LANES;
  for (int j = count; j < padded; ++j) buf[j] = -INFINITY;
  return padded;
}

// Column of the row's target in the tile, or one outside of [0, v). Any target: it wraps around.
inline int64_t target_column(const Tile& tile, int64_t i) {
  return static_cast<int64_t>(
      static_cast<uint64_t>(tile.target[i]) - static_cast<uint64_t>(tile.v0));
}

inline __attribute__((always_inline)) float strip_max(const float* buf, int padded) {
  float lane[LANES];
  for (int l = 0; l < LANES; ++l) lane[l] = -FLT_MAX;
  for (int j = 0; j < padded; j += LANES)
    for (int l = 0; l < LANES; ++l) lane[l] = buf[j + l] > lane[l] ? buf[j + l] : lane[l];
  float top = lane[0];
  for (int l = 1; l < LANES; ++l) top = lane[l] > top ? lane[l] : top;
  return top;
}

inline __attribute__((always_inline)) double sum_lanes(const float* lane) {
  double sum = 0.0;
  for (int l = 0; l < LANES; ++l) sum += lane[l];
  return sum;
}

// Bring the sums of a row to a new maximum.
inline void raise_top(const FoldState& s, int64_t i, float top) {
  const double drop = static_cast<double>(s.top[i]) - top;  // <= 0, -FLT_MAX on the first tile
  const double factor = std::exp(drop);
  if (s.moment != nullptr) {
    // sum e^(z - top') (z - top') = e^(top - top') * (moment + (top - top') * sum)
    s.moment[i] = s.sum[i] == 0.0 ? 0.0 : factor * (s.moment[i] + drop * s.sum[i]);
  }
  if (s.square_sum != nullptr) s.square_sum[i] *= factor * factor;
  s.sum[i] *= factor;
  s.top[i] = top;
}

// Whether fold_row can leave exp(z - top) in the tile: top is final and no slope is asked for.
inline bool exps_in_fold(const Tile& tile, LogitOptions o) {
  return tile.v <= STRIP && o.softcap == 0.0f;
}

// With keep_exps the row becomes exp(z - top); see exps_in_fold.
KTO_CLONES void fold_row(
    const Tile& tile, int64_t i, const FoldState& s, LogitOptions o, bool keep_exps) {
  float* x = tile.x + i * tile.stride;
  alignas(64) float buf[STRIP];
  const int64_t column = target_column(tile, i);
  for (int64_t start = 0; start < tile.v; start += STRIP) {
    const int count = static_cast<int>(tile.v - start < STRIP ? tile.v - start : STRIP);
    const float* bias = tile.bias == nullptr ? nullptr : tile.bias + start;
    const int padded = load_strip(x + start, bias, count, o, buf);
    if (column >= start && column < start + count) s.target_logit[i] = buf[column - start];
    if (s.logit_sum != nullptr) {
      float lane[LANES] = {0.0f};
      for (int j = 0; j < count / LANES * LANES; j += LANES)
        for (int l = 0; l < LANES; ++l) lane[l] += buf[j + l];
      for (int j = count / LANES * LANES; j < count; ++j) lane[0] += buf[j];
      s.logit_sum[i] += sum_lanes(lane);
    }
    const float strip_top = strip_max(buf, padded);
    if (strip_top > s.top[i]) raise_top(s, i, strip_top);
    const float top = s.top[i];
    float sum[LANES] = {0.0f};
    if (s.moment == nullptr && s.square_sum == nullptr) {
      for (int j = 0; j < padded; j += LANES)
        for (int l = 0; l < LANES; ++l) {
          buf[j + l] = exp_fp32(buf[j + l] - top);
          sum[l] += buf[j + l];
        }
    } else {
      float moment[LANES] = {0.0f}, square[LANES] = {0.0f};
      for (int j = 0; j < padded; j += LANES)
        for (int l = 0; l < LANES; ++l) {
          const float d = buf[j + l] - top;
          const float e = exp_fp32(d);
          buf[j + l] = e;
          sum[l] += e;
          moment[l] += e * (d < -1e4f ? -1e4f : d);  // 0 * -inf would be NaN
          square[l] += e * e;
        }
      if (s.moment != nullptr) s.moment[i] += sum_lanes(moment);
      if (s.square_sum != nullptr) s.square_sum[i] += sum_lanes(square);
    }
    s.sum[i] += sum_lanes(sum);
    if (keep_exps)
      for (int j = 0; j < count; ++j) x[start + j] = buf[j];
  }
}

// After fold_row: logits -> exp(z - top) * slope.
KTO_CLONES void frozen_row(const Tile& tile, int64_t i, float top, LogitOptions o) {
  float* x = tile.x + i * tile.stride;
  alignas(64) float buf[STRIP];
  for (int64_t start = 0; start < tile.v; start += STRIP) {
    const int count = static_cast<int>(tile.v - start < STRIP ? tile.v - start : STRIP);
    const float* bias = tile.bias == nullptr ? nullptr : tile.bias + start;
    load_strip(x + start, bias, count, o, buf);
    float* out = x + start;
    if (o.softcap == 0.0f)
      for (int j = 0; j < count; ++j) out[j] = exp_fp32(buf[j] - top);
    else
      for (int j = 0; j < count; ++j) out[j] = exp_fp32(buf[j] - top) * cap_slope(buf[j], o);
  }
}

KTO_CLONES void dlogits_row(const Tile& tile, int64_t i, const RowGradient& row, LogitOptions o) {
  float* x = tile.x + i * tile.stride;
  const float top = row.top[i], logsum = row.logsum[i];
  const float chain = o.logit_scale / o.temperature;
  const float dlogp = row.dlogp == nullptr ? 1.0f : row.dlogp[i];
  const float dentropy = row.dentropy == nullptr ? 0.0f : row.dentropy[i];
  const float entropy = row.dentropy == nullptr ? 0.0f : row.entropy[i];
  const int64_t column = target_column(tile, i);
  alignas(64) float buf[STRIP];
  for (int64_t start = 0; start < tile.v; start += STRIP) {
    const int count = static_cast<int>(tile.v - start < STRIP ? tile.v - start : STRIP);
    const float* bias = tile.bias == nullptr ? nullptr : tile.bias + start;
    load_strip(x + start, bias, count, o, buf);
    float* out = x + start;
    if (dentropy == 0.0f) {
      const float scale = -dlogp * chain;
      for (int j = 0; j < count; ++j) out[j] = exp_fp32((buf[j] - top) - logsum) * scale;
    } else {
      for (int j = 0; j < count; ++j) {
        const float log_p = (buf[j] - top) - logsum;
        const float finite = log_p < -1e4f ? -1e4f : log_p;
        const float pull = dlogp + dentropy * (finite + entropy);
        out[j] = exp_fp32(log_p) * pull * -chain;
      }
    }
    if (column >= start && column < start + count) {
      // 1 - p of a target that is almost certain must not come from a rounded p
      const float logp = row.logp[i];
      float own = dlogp * -std::expm1(logp);
      if (dentropy != 0.0f && logp > -1e4f) own -= dentropy * std::exp(logp) * (logp + entropy);
      out[column - start] = chain * own;
    }
    if (o.softcap != 0.0f)
      for (int j = 0; j < count; ++j) out[j] *= cap_slope(buf[j], o);
  }
}

}  // namespace

void fold(const Tile& tile, const FoldState& state, LogitOptions options, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t i = 0; i < tile.n; ++i) fold_row(tile, i, state, options, false);
}

void fold_frozen(
    const Tile& tile, const FoldState& state, LogitOptions options, float* rescale, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t i = 0; i < tile.n; ++i) {
    const double before = state.top[i];
    const bool keep_exps = exps_in_fold(tile, options);
    fold_row(tile, i, state, options, keep_exps);
    rescale[i] = static_cast<float>(std::exp(before - static_cast<double>(state.top[i])));
    if (!keep_exps) frozen_row(tile, i, state.top[i], options);
    const int64_t column = target_column(tile, i);
    if (column >= 0 && column < tile.v) tile.x[i * tile.stride + column] = 0.0f;
  }
}

void finish(
    const FoldState& state, int64_t n, float* logp, float* logsum, float* entropy,
    float* log_sum_sq_prob, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t i = 0; i < n; ++i) {
    const double log_sum = std::log(state.sum[i]);
    logsum[i] = static_cast<float>(log_sum);
    logp[i] = (state.target_logit[i] - state.top[i]) - logsum[i];
    if (entropy != nullptr)
      entropy[i] = static_cast<float>(log_sum - state.moment[i] / state.sum[i]);
    if (log_sum_sq_prob != nullptr)
      log_sum_sq_prob[i] = static_cast<float>(std::log(state.square_sum[i]) - 2.0 * log_sum);
  }
}

void dlogits(const Tile& tile, const RowGradient& row, LogitOptions options, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t i = 0; i < tile.n; ++i) dlogits_row(tile, i, row, options);
}

KTO_CLONES void exp_array(const float* x, float* out, int64_t n) {
  for (int64_t i = 0; i < n; ++i) out[i] = exp_fp32(x[i]);
}

KTO_CLONES void tanh_array(const float* x, float* out, int64_t n) {
  for (int64_t i = 0; i < n; ++i) out[i] = tanh_fp32(x[i]);
}

}  // namespace stepkto
