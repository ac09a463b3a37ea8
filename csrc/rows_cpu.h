// Row kernels over one tile of logits, CPU. See rows_cpu.cpp.
#pragma once

#include <cstdint>

#include "kto_math.h"

namespace stepkto {

// n rows of hidden @ weight.T, v columns; the columns are vocabulary entries v0, v0 + 1, ...
struct Tile {
  float* x;            // (n, v) fp32
  int64_t n, v;
  int64_t stride;      // floats from one row to the next
  const float* bias;   // (v,) or null
  const int64_t* target;  // (n,), any value outside of [v0, v0 + v) is not in this tile
  int64_t v0;
};

// Running log-sum-exp and statistics of n rows. The last three may be null.
struct FoldState {
  float* top;           // (n,) largest z so far, starts at -FLT_MAX
  double* sum;          // (n,) sum of exp(z - top)
  float* target_logit;  // (n,)
  double* logit_sum;    // (n,) sum of z
  double* moment;       // (n,) sum of exp(z - top) * (z - top), for the entropy
  double* square_sum;   // (n,) sum of exp(2 * (z - top))
};

// What a row's dlogits are made of, (n,) each; see rows.RowGradient.
struct RowGradient {
  const float* top;
  const float* logsum;
  const float* logp;
  const float* dlogp;     // null: 1
  const float* dentropy;  // null: none
  const float* entropy;   // null where dentropy is
};

// Fold a tile into the running state.
void fold(const Tile& tile, const FoldState& state, LogitOptions options, int threads);

// Fold, and leave exp(z - top) * slope in the tile, 0 at the target. rescale (n,) gets what the sums
// of earlier tiles are to be multiplied by.
void fold_frozen(
    const Tile& tile, const FoldState& state, LogitOptions options, float* rescale, int threads);

// logp and log of the running sum, (n,) each, and of what was asked for (null: not) entropy and
// log sum p^2.
void finish(
    const FoldState& state, int64_t n, float* logp, float* logsum, float* entropy,
    float* log_sum_sq_prob, int threads);

// Logits -> gradient of the loss in them, in place.
void dlogits(const Tile& tile, const RowGradient& row, LogitOptions options, int threads);

// out[i] = exp(x[i]), for the test of its error.
void exp_array(const float* x, float* out, int64_t n);
void tanh_array(const float* x, float* out, int64_t n);

}  // namespace stepkto
