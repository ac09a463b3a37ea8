// Segment sums and both KTO losses of a batch, CPU. See segments_cpu.cpp.
#pragma once

#include <cstdint>

#include "kto_math.h"

namespace stepkto {

// N tokens, B sequences, S steps; see segments.StepSegments.
struct Segments {
  int64_t N, B, S;
  const int32_t* sequence_index;  // (N,), -1 = not scored
  const int32_t* step_index;      // (N,), -1 = in no step
  const int8_t* outcome_label;    // (B,), 1, 0 or -1
  const int8_t* step_label;       // (S,), 1, 0 or -1
  const int32_t* step_sequence;   // (S,), -1 takes the step out of the loss
};

// Sums over the tokens of each segment of one level, n = B or S; all (n,) fp64 and added to.
struct LevelSums {
  double* ratio;   // clamped log-ratios, nats
  double* logp;    // policy log-probs, nats
  double* tokens;  // number of tokens
};

enum class StepReduction { sequence_mean = 0, mean = 1, sum = 2 };

// config.SegmentOptions with the reference points and normalizers of a batch.
struct LossOptions {
  KtoLevel outcome, step;
  double step_weight;
  StepReduction step_reduction;
  bool length_normalize;
  double outcome_normalizer, step_normalizer;  // n_o, n_s; 0: nothing to divide
};

// Adds the tokens to their segments in token order, so a segment's bits depend on its tokens only.
void segment_sums(
    const Segments& segments, const float* logps, const float* ref_logps, double clip_low,
    double clip_high, const LevelSums& outcome, const LevelSums& step);

constexpr int64_t NUM_TOTALS = 23;  // len(metrics.TOTALS)

// Loss and metric totals (metrics.TOTALS) of a batch, and d loss / d ratio[t] for the tokens of each
// sequence (B,) and step (S,).
void batch_loss(
    const Segments& segments, const LevelSums& outcome, const LevelSums& step,
    const LossOptions& options, double* loss, double* totals, double* outcome_slope,
    double* step_slope);

// g[t] = scale * (outcome_slope[sequence of t] + step_slope[step of t]); 0 where clipped. (N,)
void token_slopes(
    const Segments& segments, const float* logps, const float* ref_logps, double clip_low,
    double clip_high, const double* outcome_slope, const double* step_slope, double scale,
    float* g);

}  // namespace stepkto
