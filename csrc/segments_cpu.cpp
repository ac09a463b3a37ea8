// Segment sums and both KTO losses of a batch: the formulas of step_kto.py, in fp64 and one thread.
//
// There are a few numbers a segment and one addition a token, so threads would cost more than they
// save; a fixed order makes every bit reproducible.

#include "segments_cpu.h"

#include <cmath>
#include <vector>

namespace stepkto {
namespace {

constexpr double SATURATED = 7.0;  // metrics.SATURATED

// Exact: the difference of two fp32 numbers of like size fits fp64.
inline double log_ratio(float logp, float ref_logp) {
  return static_cast<double>(logp) - static_cast<double>(ref_logp);
}

// What of a token's log-ratio goes into the sums. NaN stays NaN.
inline double clamped(double ratio, double low, double high) {
  return ratio < low ? low : ratio > high ? high : ratio;
}

inline double per_token(const LevelSums& sums, int64_t i, bool length_normalize) {
  return length_normalize && sums.tokens[i] > 1.0 ? 1.0 / sums.tokens[i] : 1.0;
}

// metrics.LEVEL_TOTALS without loss and terms, which differ between the levels.
struct LevelTotals {
  double count[2] = {0, 0}, reward[2] = {0, 0}, logp[2] = {0, 0};  // rejected, chosen
  double saturated = 0;

  void add(int label, double r, double logps, double u, double beta) {
    count[label] += 1.0;
    reward[label] += beta * r;
    logp[label] += logps;
    saturated += std::fabs(u) > SATURATED ? 1.0 : 0.0;
  }

  double* write(double* out, double loss, double terms, double z) const {
    for (double value : {loss, terms, z}) *out++ = value;
    for (int label : {1, 0})
      for (double value : {count[label], reward[label], logp[label]}) *out++ = value;
    *out++ = saturated;
    return out;
  }
};

// Number of tokens in a labelled segment.
int64_t scored_tokens(const Segments& s) {
  int64_t count = 0;
  for (int64_t t = 0; t < s.N; ++t) {
    const int32_t sequence = s.sequence_index[t], h = s.step_index[t];
    const bool outcome = sequence >= 0 && s.outcome_label[sequence] >= 0;
    const bool step = h >= 0 && s.step_label[h] >= 0 && s.step_sequence[h] >= 0;
    count += outcome || step;
  }
  return count;
}

}  // namespace

void segment_sums(
    const Segments& s, const float* logps, const float* ref_logps, double clip_low,
    double clip_high, const LevelSums& outcome, const LevelSums& step) {
  for (int64_t t = 0; t < s.N; ++t) {
    const double ratio = clamped(log_ratio(logps[t], ref_logps[t]), clip_low, clip_high);
    const int32_t sequence = s.sequence_index[t], h = s.step_index[t];
    if (sequence >= 0) {
      outcome.ratio[sequence] += ratio;
      outcome.logp[sequence] += logps[t];
      outcome.tokens[sequence] += 1.0;
    }
    if (h >= 0) {
      step.ratio[h] += ratio;
      step.logp[h] += logps[t];
      step.tokens[h] += 1.0;
    }
  }
}

void batch_loss(
    const Segments& s, const LevelSums& outcome, const LevelSums& step, const LossOptions& options,
    double* loss, double* totals, double* outcome_slope, double* step_slope) {
  const double n_o = divisor(options.outcome_normalizer);
  const double n_s = divisor(options.step_normalizer);

  LevelTotals outcome_totals;
  double outcome_loss = 0, outcome_terms = 0;
  for (int64_t i = 0; i < s.B; ++i) {
    const double scale = per_token(outcome, i, options.length_normalize);
    const double r = outcome.ratio[i] * scale;
    const KtoTerm term = kto_term(r, s.outcome_label[i], options.outcome);
    outcome_slope[i] = term.slope * scale / n_o;
    if (s.outcome_label[i] < 0) continue;
    outcome_loss += term.value;
    outcome_terms += 1.0;
    outcome_totals.add(s.outcome_label[i], r, outcome.logp[i], term.u, options.outcome.beta);
  }

  std::vector<double> labelled(s.B, 0.0);  // labelled steps of each sequence
  double labelled_steps = 0, sequences_with_steps = 0;
  for (int64_t h = 0; h < s.S; ++h)
    if (s.step_label[h] >= 0 && s.step_sequence[h] >= 0) {
      labelled_steps += 1.0;
      if ((labelled[s.step_sequence[h]] += 1.0) == 1.0) sequences_with_steps += 1.0;
    }
  const bool by_step = options.step_reduction == StepReduction::mean;
  const double step_terms = by_step ? labelled_steps : sequences_with_steps;

  LevelTotals step_totals;
  double step_loss = 0;
  for (int64_t h = 0; h < s.S; ++h) {
    const int label = s.step_sequence[h] < 0 ? -1 : s.step_label[h];
    const double scale = per_token(step, h, options.length_normalize);
    const double r = step.ratio[h] * scale;
    const KtoTerm term = kto_term(r, label, options.step);
    step_slope[h] = 0.0;
    if (label < 0) continue;
    const double share = options.step_reduction == StepReduction::sequence_mean
                             ? 1.0 / labelled[s.step_sequence[h]]
                             : 1.0;
    step_slope[h] = options.step_weight * share * term.slope * scale / n_s;
    step_loss += share * term.value;
    step_totals.add(label, r, step.logp[h], term.u, options.step.beta);
  }

  *loss = outcome_loss / n_o + options.step_weight * step_loss / n_s;
  const double tokens = static_cast<double>(scored_tokens(s));
  for (double value : {1.0, tokens, options.step_weight * step_loss}) *totals++ = value;
  totals = outcome_totals.write(totals, outcome_loss, outcome_terms, options.outcome.z);
  step_totals.write(totals, step_loss, step_terms, options.step.z);
}

void token_slopes(
    const Segments& s, const float* logps, const float* ref_logps, double clip_low,
    double clip_high, const double* outcome_slope, const double* step_slope, double scale,
    float* g) {
  for (int64_t t = 0; t < s.N; ++t) {
    const double ratio = log_ratio(logps[t], ref_logps[t]);
    const bool clipped = ratio < clip_low || ratio > clip_high;
    const int32_t sequence = s.sequence_index[t], h = s.step_index[t];
    const double slope =
        (sequence < 0 ? 0.0 : outcome_slope[sequence]) + (h < 0 ? 0.0 : step_slope[h]);
    g[t] = clipped ? 0.0f : static_cast<float>(scale * slope);
  }
}

}  // namespace stepkto
