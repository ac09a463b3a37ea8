// Segment sums and both KTO losses of a batch, CUDA. See step_kto_cuda.cu.
//
// The arithmetic here is for host and device alike; the launchers take device addresses, a device
// number and a cudaStream_t as void*, return a cudaError_t as int, and wait for nothing.
#pragma once

#include <cmath>
#include <cstdint>

#include "segments_cpu.h"

namespace stepkto::cuda {

// ---- sums that do not depend on the order of the addends --------------------------------------

// A number as limbs of 25 bits, limb k in units of 2^(25 k - 56): 32 of a limb fit int32, 2^38 fit
// int64. Sums of limbs are exact, so any order and any split over threads gives the same bits.
//
// An addend is rounded to 2^-56 (7e-18 off at most) and kept within +-2^44 (1.8e13) nats.
constexpr int LIMBS = 4, LIMB_BITS = 25;
constexpr double LARGEST = 0x1p44;

// What limbs cannot say; bits that are or-ed over the addends.
constexpr uint32_t HAS_NAN = 1, HAS_PLUS_INFINITY = 2, HAS_MINUS_INFINITY = 4, SPECIAL_BITS = 3;

struct Fixed {
  int32_t limb[LIMBS];  // at most 2^25 in size, all of the sign of the number
  uint32_t special;
};

KTO_INLINE Fixed to_fixed(double x) {
  Fixed out;
  const bool infinite = x - x != 0.0;  // or NaN
  out.special = !infinite ? 0 : x > 0 ? HAS_PLUS_INFINITY : x < 0 ? HAS_MINUS_INFINITY : HAS_NAN;
  double rest = infinite ? 0.0 : x < -LARGEST ? -LARGEST : x > LARGEST ? LARGEST : x;
  // every difference is exact: it drops leading bits of `rest`
  out.limb[3] = static_cast<int32_t>(rest * 0x1p-19);
  rest -= out.limb[3] * 0x1p19;
  out.limb[2] = static_cast<int32_t>(rest * 0x1p6);
  rest -= out.limb[2] * 0x1p-6;
  out.limb[1] = static_cast<int32_t>(rest * 0x1p31);
  rest -= out.limb[1] * 0x1p-31;
  out.limb[0] = static_cast<int32_t>(rint(rest * 0x1p56));
  return out;
}

// The fp64 next to a sum of limbs, rounded once where it is below 2^47.
KTO_INLINE double from_fixed(int64_t l0, int64_t l1, int64_t l2, int64_t l3, uint32_t special) {
  const int64_t mask = (int64_t{1} << LIMB_BITS) - 1;
  l1 += l0 >> LIMB_BITS;
  l2 += l1 >> LIMB_BITS;
  l3 += l2 >> LIMB_BITS;
  const double high = static_cast<double>(l3) * 0x1p25 + static_cast<double>(l2 & mask);
  const double low = static_cast<double>(((l1 & mask) << LIMB_BITS) | (l0 & mask));
  const double finite = high * 0x1p-6 + low * 0x1p-56;
  const bool plus = special & HAS_PLUS_INFINITY, minus = special & HAS_MINUS_INFINITY;
  if ((special & HAS_NAN) || (plus && minus)) return NAN;
  return plus ? INFINITY : minus ? -INFINITY : finite;
}

// ---- the formulas of segments_cpu.cpp, a segment at a time ------------------------------------

// Exact: the difference of two fp32 numbers of like size fits fp64.
KTO_INLINE double log_ratio(float logp, float ref_logp) {
  return static_cast<double>(logp) - static_cast<double>(ref_logp);
}

// What of a token's log-ratio goes into the sums. NaN stays NaN.
KTO_INLINE double clamped(double ratio, double low, double high) {
  return ratio < low ? low : ratio > high ? high : ratio;
}

// Sums over the tokens of one segment.
struct SegmentSums {
  double ratio, logp, tokens;
};

// d r / d (sum of log-ratios).
KTO_INLINE double per_token(const SegmentSums& x, bool length_normalize) {
  return length_normalize && x.tokens > 1.0 ? 1.0 / x.tokens : 1.0;
}

// max(0, mean), 0 of nothing. NaN stays NaN.
KTO_INLINE double matched_point(double total, double count) {
  const double mean = total / (count > 1.0 ? count : 1.0);
  return mean < 0.0 ? 0.0 : mean;
}

// Sums over the labelled segments of one level; an array, so that a reduction can loop over it.
struct LevelTotals {
  static constexpr int SIZE = 9;
  enum Name { LOSS, CHOSEN, CHOSEN_REWARD, CHOSEN_LOGP, REJECTED, REJECTED_REWARD, REJECTED_LOGP,
              SATURATED, WITH_STEPS };  // WITH_STEPS: sequences that have a labelled step
  double value[SIZE] = {0, 0, 0, 0, 0, 0, 0, 0, 0};

  // Counts in a segment. Returns share * d l / d (sum of log-ratios); an unlabelled segment has
  // none and adds nothing, even where it is NaN.
  KTO_INLINE double add(
      const SegmentSums& x, int label, double share, const KtoLevel& level, bool length_normalize) {
    if (label < 0) return 0.0;
    const double scale = per_token(x, length_normalize);
    const double r = x.ratio * scale, reward = level.beta * r;
    const KtoTerm term = kto_term(r, label, level);
    const bool right = label > 0;
    value[LOSS] += share * term.value;
    value[CHOSEN] += right ? 1.0 : 0.0;
    value[CHOSEN_REWARD] += right ? reward : 0.0;
    value[CHOSEN_LOGP] += right ? x.logp : 0.0;
    value[REJECTED] += right ? 0.0 : 1.0;
    value[REJECTED_REWARD] += right ? 0.0 : reward;
    value[REJECTED_LOGP] += right ? 0.0 : x.logp;
    value[SATURATED] += fabs(term.u) > 7.0 ? 1.0 : 0.0;  // metrics.SATURATED
    return share * term.slope * scale;
  }

  KTO_INLINE double labelled() const { return value[CHOSEN] + value[REJECTED]; }

  // metrics.LEVEL_TOTALS
  KTO_INLINE double* write(double* out, double terms, double z) const {
    *out++ = value[LOSS];
    *out++ = terms;
    *out++ = z;
    for (int k = CHOSEN; k <= SATURATED; ++k) *out++ = value[k];
    return out;
  }
};

// Loss () and metrics.TOTALS of a batch.
KTO_INLINE void write_loss(
    const LossOptions& o, const LevelTotals& outcome, const LevelTotals& step, double tokens,
    double* loss, double* totals) {
  const double weighted = o.step_weight * step.value[LevelTotals::LOSS];
  *loss = outcome.value[LevelTotals::LOSS] / divisor(o.outcome_normalizer) +
          weighted / divisor(o.step_normalizer);
  *totals++ = 1.0;
  *totals++ = tokens;
  *totals++ = weighted;
  totals = outcome.write(totals, outcome.labelled(), o.outcome.z);
  const bool by_step = o.step_reduction == StepReduction::mean;
  step.write(totals, by_step ? step.labelled() : outcome.value[LevelTotals::WITH_STEPS], o.step.z);
}

// ---- launchers --------------------------------------------------------------------------------

// Tokens to add: all of the batch's, or those at `rows`.
struct Tokens {
  int64_t n;
  const int64_t* rows;     // (n,) positions in the batch; null: token t is position t
  const float* logps;      // (n,) nats
  const float* ref_logps;  // (n,)
  double clip_low, clip_high;
};

// Number of int64 words of a workspace; all 0 before its first use.
int64_t workspace_words(int64_t B, int64_t S);

// Where the loss of a batch comes from and goes to.
struct Loss {
  LossOptions options;      // its reference points and normalizers are taken from below
  const double *z_o, *z_s;  // () reference points
  const double *n_o, *n_s;  // () normalizers
  bool matched;             // take the reference points from the batch instead
  double* loss;             // ()
  double* totals;           // (len(metrics.TOTALS),)
  double* outcome_slope;    // (B,) d loss / d ratio[t] for the tokens of a sequence
  double* step_slope;       // (S,)
};

struct Queue {
  int device;
  void* stream;
};

// Everything from log-probs to loss. Leaves the workspace at 0. sums: (3, B + S) fp64, rows ratio,
// logp, tokens; columns sequences, then steps.
int forward(
    const Segments& segments, const Tokens& tokens, const Loss& loss, int64_t* workspace,
    double* sums, Queue queue);

// The same in parts: segment_sums adds tokens to the workspace, as often as wanted; read_sums and
// batch_loss are of all that was added and keep it.
int segment_sums(
    const Segments& segments, const Tokens& tokens, int64_t* workspace, Queue queue);
int read_sums(const Segments& segments, int64_t* workspace, double* sums, Queue queue);
int batch_loss(
    const Segments& segments, const Loss& loss, int64_t* workspace, double* sums, Queue queue);

// g[t] = factor * scale * (outcome_slope[sequence of t] + step_slope[step of t]); 0 where clipped.
// g: (n,) fp32. scale: () fp32, null for 1.
int token_slopes(
    const Segments& segments, const Tokens& tokens, const double* outcome_slope,
    const double* step_slope, const float* scale, double factor, float* g, Queue queue);

}  // namespace stepkto::cuda
