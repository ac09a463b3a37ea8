// Segment sums, both KTO losses and the slopes of a batch: segments_cpu.cpp for CUDA.
//
// Any thread may add to any segment, as layouts do not promise that a segment's tokens are
// neighbours. The sums are integers (step_kto_cuda.h: limbs of a fixed-point number), so they are
// exact, and neither the order of the atomics nor the grid nor the order of the tokens can change a
// bit. The block that finishes last turns them into fp64 and reduces the losses in a fixed order.
//
// Cost of `forward`, one launch: 16 bytes a token read (8 of them twice, the second time from a
// cache) and 1 a label; 80 bytes of workspace a segment added to, read and set back to 0; 32 bytes
// a segment written. A warp first adds up what goes to the same segment and then issues at most 9
// atomics for each sequence and each step among its 32 tokens: N / 32 * 18 where segments are long,
// 18 N where no token shares a segment with another of its warp.
// The last block does all B + S losses, two fp64 exp each, 512 at a time.
// `segment_sums` is the first half and `batch_loss` the second (8 bytes a token, for the count of
// scored tokens), `token_slopes` reads 16 bytes a token and writes 4; one launch each.
//
// An index past its end gives a NaN loss and NaN slopes: checking it on the host would mean to wait
// for the device.

#include "step_kto_cuda.h"

#include <cuda_runtime.h>

namespace stepkto::cuda {
namespace {

constexpr int THREADS = 512, WARPS = THREADS / 32;
constexpr int64_t MAX_BLOCKS = 1024;  // beyond it a thread takes several tokens
constexpr unsigned ALL_LANES = 0xffffffffu;

using Word = unsigned long long;

// A batch of M = B + S segments: sequence i is segment i, step h is segment B + h.
struct Batch {
  Segments segments;
  Tokens tokens;
  Loss loss;
  int64_t* workspace;
  double* sums;  // (3, M)
  bool reset;    // set the sums in the workspace back to 0

  __device__ int64_t M() const { return segments.B + segments.S; }

  // Workspace: three words, LIMBS limbs of ratio and LIMBS of logp (LIMBS, M) each, number of
  // tokens (M,), special bits (M,), labelled steps (B,).
  __device__ Word* at(int64_t i) const { return reinterpret_cast<Word*>(workspace) + i; }
  __device__ Word* blocks_done() const { return at(0); }
  __device__ Word* scored_tokens() const { return at(1); }
  __device__ Word* out_of_range() const { return at(2); }
  __device__ Word* ratio(int k, int64_t i) const { return at(3 + k * M() + i); }
  __device__ Word* logp(int k, int64_t i) const { return at(3 + (LIMBS + k) * M() + i); }
  __device__ Word* num_tokens(int64_t i) const { return at(3 + 2 * LIMBS * M() + i); }
  __device__ Word* special(int64_t i) const { return at(3 + (2 * LIMBS + 1) * M() + i); }
  __device__ Word* labelled_steps(int64_t i) const { return at(3 + (2 * LIMBS + 2) * M() + i); }

  // Label of a step that counts, -1 otherwise.
  __device__ int step_label(int64_t h) const {
    const int32_t sequence = segments.step_sequence[h];
    return sequence >= 0 && sequence < segments.B ? segments.step_label[h] : -1;
  }
};

__device__ int lane_id() { return threadIdx.x % 32; }

__device__ int64_t first_index() {
  return static_cast<int64_t>(blockIdx.x) * THREADS + threadIdx.x;
}

__device__ int64_t all_threads() { return static_cast<int64_t>(gridDim.x) * THREADS; }

// Index of a token, -1 where it has none or one past the end, which is noted.
__device__ int64_t checked(const Batch& b, int32_t index, int64_t size) {
  if (index < size) return index < 0 ? -1 : index;
  atomicOr(b.out_of_range(), Word{1});
  return -1;
}

// Adds a token of each lane to its segment, -1 = none. All lanes of a warp must call.
__device__ void add_to_segment(
    const Batch& b, int64_t segment, const Fixed& ratio, const Fixed& logp) {
  const unsigned peers = __match_any_sync(ALL_LANES, static_cast<unsigned>(segment));
  if (segment < 0) return;
  const bool first = lane_id() == __ffs(peers) - 1;
  // a limb of 0 is common: log-probs have 24 bits, which are two limbs at most
#pragma unroll
  for (int k = 0; k < LIMBS; ++k) {
    const int r = __reduce_add_sync(peers, ratio.limb[k]);
    const int l = __reduce_add_sync(peers, logp.limb[k]);
    if (first && r) atomicAdd(b.ratio(k, segment), static_cast<Word>(static_cast<int64_t>(r)));
    if (first && l) atomicAdd(b.logp(k, segment), static_cast<Word>(static_cast<int64_t>(l)));
  }
  const unsigned special =
      __reduce_or_sync(peers, ratio.special | logp.special << SPECIAL_BITS);
  if (first) atomicAdd(b.num_tokens(segment), static_cast<Word>(__popc(peers)));
  if (first && special) atomicOr(b.special(segment), static_cast<Word>(special));
}

__device__ void add_tokens(const Batch& b) {
  const Tokens& x = b.tokens;
  // by whole warps: a lane past the end adds to no segment
  for (int64_t t = first_index(); t - lane_id() < x.n; t += all_threads()) {
    int64_t sequence = -1, step = -1;
    float logp = 0.0f, ref_logp = 0.0f;
    if (t < x.n) {
      const int64_t position = x.rows == nullptr ? t : x.rows[t];
      sequence = checked(b, b.segments.sequence_index[position], b.segments.B);
      step = checked(b, b.segments.step_index[position], b.segments.S);
      logp = x.logps[t];
      ref_logp = x.ref_logps[t];
    }
    const Fixed ratio = to_fixed(clamped(log_ratio(logp, ref_logp), x.clip_low, x.clip_high));
    const Fixed logps = to_fixed(logp);
    add_to_segment(b, sequence, ratio, logps);
    add_to_segment(b, step < 0 ? -1 : b.segments.B + step, ratio, logps);
  }
}

// Number of tokens in a labelled segment, and of labelled steps of each sequence.
__device__ void count_labels(const Batch& b) {
  const Segments& s = b.segments;
  unsigned scored = 0;
  for (int64_t t = first_index(); t < s.N; t += all_threads()) {
    const int64_t sequence = checked(b, s.sequence_index[t], s.B);
    const int64_t step = checked(b, s.step_index[t], s.S);
    const bool outcome = sequence >= 0 && s.outcome_label[sequence] >= 0;
    scored += outcome || (step >= 0 && b.step_label(step) >= 0);
  }
  scored = __reduce_add_sync(ALL_LANES, scored);
  if (lane_id() == 0 && scored) atomicAdd(b.scored_tokens(), static_cast<Word>(scored));
  for (int64_t h = first_index(); h < s.S; h += all_threads()) {
    const int64_t sequence = checked(b, s.step_sequence[h], s.B);
    if (sequence >= 0 && s.step_label[h] >= 0) atomicAdd(b.labelled_steps(sequence), Word{1});
  }
}

// True in all threads of the block that comes here last, which then sees what all others wrote.
__device__ bool is_last_block(const Batch& b) {
  __shared__ bool last;
  __threadfence();
  __syncthreads();
  if (threadIdx.x == 0) last = atomicAdd(b.blocks_done(), Word{1}) == gridDim.x - 1;
  __syncthreads();
  __threadfence();
  return last;
}

// Past L1, which does not see other blocks' atomics.
__device__ int64_t load(const Word* x) { return static_cast<int64_t>(__ldcg(x)); }

__device__ SegmentSums read_segment(const Batch& b, int64_t i) {
  const uint32_t special = static_cast<uint32_t>(load(b.special(i)));
  return {
      from_fixed(load(b.ratio(0, i)), load(b.ratio(1, i)), load(b.ratio(2, i)),
                 load(b.ratio(3, i)), special),
      from_fixed(load(b.logp(0, i)), load(b.logp(1, i)), load(b.logp(2, i)), load(b.logp(3, i)),
                 special >> SPECIAL_BITS),
      static_cast<double>(load(b.num_tokens(i)))};
}

__device__ void reset_segment(const Batch& b, int64_t i) {
#pragma unroll
  for (int k = 0; k < LIMBS; ++k) *b.ratio(k, i) = *b.logp(k, i) = 0;
  *b.num_tokens(i) = *b.special(i) = 0;
}

__device__ void store_sums(const Batch& b, int64_t i, const SegmentSums& x) {
  b.sums[i] = x.ratio;
  b.sums[b.M() + i] = x.logp;
  b.sums[2 * b.M() + i] = x.tokens;
}

__device__ SegmentSums stored_sums(const Batch& b, int64_t i) {
  return {b.sums[i], b.sums[b.M() + i], b.sums[2 * b.M() + i]};
}

// Sums over the block in a fixed order, in every thread.
template <int K>
__device__ void block_sum(double (&value)[K]) {
  __shared__ double of_warp[WARPS][K];
#pragma unroll
  for (int k = 0; k < K; ++k)
#pragma unroll
    for (int lanes = 16; lanes; lanes /= 2)
      value[k] += __shfl_xor_sync(ALL_LANES, value[k], lanes);
  if (lane_id() == 0)
#pragma unroll
    for (int k = 0; k < K; ++k) of_warp[threadIdx.x / 32][k] = value[k];
  __syncthreads();
#pragma unroll
  for (int k = 0; k < K; ++k) {
    value[k] = 0.0;
    for (int warp = 0; warp < WARPS; ++warp) value[k] += of_warp[warp][k];
  }
  __syncthreads();  // before of_warp is written again
}

// By one block.
__device__ void finish(const Batch& b) {
  const Segments& s = b.segments;
  LossOptions o = b.loss.options;
  o.outcome.z = *b.loss.z_o;
  o.step.z = *b.loss.z_s;
  o.outcome_normalizer = *b.loss.n_o;
  o.step_normalizer = *b.loss.n_s;

  double labelled[4] = {0, 0, 0, 0};  // sum of r and number: sequences, steps
  for (int64_t i = threadIdx.x; i < b.M(); i += THREADS) {
    const SegmentSums x = read_segment(b, i);
    store_sums(b, i, x);
    if (b.reset) reset_segment(b, i);
    const bool sequence = i < s.B;
    const int label = sequence ? s.outcome_label[i] : b.step_label(i - s.B);
    if (label < 0) continue;
    const double r = x.ratio * per_token(x, o.length_normalize);
    labelled[0] += sequence ? r : 0.0;
    labelled[1] += sequence ? 1.0 : 0.0;
    labelled[2] += sequence ? 0.0 : r;
    labelled[3] += sequence ? 0.0 : 1.0;
  }
  if (b.loss.matched) {
    block_sum(labelled);
    o.outcome.z = matched_point(labelled[0], labelled[1]);
    o.step.z = matched_point(labelled[2], labelled[3]);
  }
  __syncthreads();  // the sums are there

  const double valid = load(b.out_of_range()) ? NAN : 1.0;
  const double n_o = divisor(o.outcome_normalizer), n_s = divisor(o.step_normalizer);
  LevelTotals outcome, step;
  for (int64_t i = threadIdx.x; i < s.B; i += THREADS) {
    const double slope = outcome.add(
        stored_sums(b, i), s.outcome_label[i], 1.0, o.outcome, o.length_normalize);
    b.loss.outcome_slope[i] = valid * slope / n_o;
    outcome.value[LevelTotals::WITH_STEPS] += load(b.labelled_steps(i)) ? 1.0 : 0.0;
  }
  block_sum(outcome.value);
  for (int64_t h = threadIdx.x; h < s.S; h += THREADS) {
    const int label = b.step_label(h);
    double share = 1.0;
    if (label >= 0 && o.step_reduction == StepReduction::sequence_mean)
      share = 1.0 / static_cast<double>(load(b.labelled_steps(s.step_sequence[h])));
    const double slope =
        step.add(stored_sums(b, s.B + h), label, share, o.step, o.length_normalize);
    b.loss.step_slope[h] = valid * o.step_weight * slope / n_s;
  }
  block_sum(step.value);

  if (threadIdx.x == 0) {
    const double tokens = static_cast<double>(load(b.scored_tokens()));
    write_loss(o, outcome, step, tokens, b.loss.loss, b.loss.totals);
    *b.loss.loss *= valid;
    *b.blocks_done() = *b.scored_tokens() = 0;
    if (b.reset) *b.out_of_range() = 0;
  }
  for (int64_t i = threadIdx.x; i < s.B; i += THREADS) *b.labelled_steps(i) = 0;
}

template <bool ADD, bool LOSS>
__global__ void __launch_bounds__(THREADS) batch_kernel(const Batch b) {
  if (ADD) add_tokens(b);
  if (!LOSS) return;
  count_labels(b);
  if (is_last_block(b)) finish(b);
}

__global__ void __launch_bounds__(THREADS) read_sums_kernel(const Batch b) {
  for (int64_t i = first_index(); i < b.M(); i += all_threads())
    store_sums(b, i, read_segment(b, i));
}

struct Slopes {
  Segments segments;
  Tokens tokens;
  const double *outcome, *step;
  const float* scale;
  double factor;
  float* g;
};

__device__ double slope_at(const double* slope, int32_t index, int64_t size) {
  return index < 0 ? 0.0 : index < size ? slope[index] : NAN;
}

__global__ void __launch_bounds__(THREADS) token_slopes_kernel(const Slopes p) {
  const Tokens& x = p.tokens;
  const double scale = p.factor * (p.scale == nullptr ? 1.0 : static_cast<double>(*p.scale));
  for (int64_t t = first_index(); t < x.n; t += all_threads()) {
    const int64_t position = x.rows == nullptr ? t : x.rows[t];
    const double ratio = log_ratio(x.logps[t], x.ref_logps[t]);
    const bool clipped = ratio < x.clip_low || ratio > x.clip_high;
    const double slope =
        slope_at(p.outcome, p.segments.sequence_index[position], p.segments.B) +
        slope_at(p.step, p.segments.step_index[position], p.segments.S);
    p.g[t] = clipped ? 0.0f : static_cast<float>(scale * slope);
  }
}

// One thread for each of `work` items, as far as MAX_BLOCKS reach; at least one block, for finish.
template <typename Argument>
int launch(void (*kernel)(Argument), Argument argument, int64_t work, Queue queue) {
  // the caller's own copy of the CUDA runtime may have chosen the device
  int current = -1;
  if (cudaError_t error = cudaGetDevice(&current)) return error;
  if (current != queue.device)
    if (cudaError_t error = cudaSetDevice(queue.device)) return error;
  int64_t blocks = (work + THREADS - 1) / THREADS;
  blocks = blocks < 1 ? 1 : blocks > MAX_BLOCKS ? MAX_BLOCKS : blocks;
  void* arguments[] = {&argument};
  const dim3 grid(static_cast<unsigned>(blocks)), block(THREADS);
  const auto stream = static_cast<cudaStream_t>(queue.stream);
  const cudaError_t error = cudaLaunchKernel(kernel, grid, block, arguments, 0, stream);
  const cudaError_t last = cudaGetLastError();  // taken in any case, so that it does not stay
  return error != cudaSuccess ? error : last;
}

int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }

}  // namespace

int64_t workspace_words(int64_t B, int64_t S) { return 3 + (2 * LIMBS + 2) * (B + S) + B; }

int forward(
    const Segments& segments, const Tokens& tokens, const Loss& loss, int64_t* workspace,
    double* sums, Queue queue) {
  const Batch batch = {segments, tokens, loss, workspace, sums, true};
  const int64_t work = larger(larger(tokens.n, segments.N), segments.S);
  return launch(&batch_kernel<true, true>, batch, work, queue);
}

int segment_sums(
    const Segments& segments, const Tokens& tokens, int64_t* workspace, Queue queue) {
  const Batch batch = {segments, tokens, Loss{}, workspace, nullptr, false};
  return launch(&batch_kernel<true, false>, batch, tokens.n, queue);
}

int read_sums(const Segments& segments, int64_t* workspace, double* sums, Queue queue) {
  const Batch batch = {segments, Tokens{}, Loss{}, workspace, sums, false};
  return launch(&read_sums_kernel, batch, segments.B + segments.S, queue);
}

int batch_loss(
    const Segments& segments, const Loss& loss, int64_t* workspace, double* sums, Queue queue) {
  const Batch batch = {segments, Tokens{}, loss, workspace, sums, false};
  const int64_t work = larger(segments.N, segments.S);
  return launch(&batch_kernel<false, true>, batch, work, queue);
}

int token_slopes(
    const Segments& segments, const Tokens& tokens, const double* outcome_slope,
    const double* step_slope, const float* scale, double factor, float* g, Queue queue) {
  const Slopes slopes = {segments, tokens, outcome_slope, step_slope, scale, factor, g};
  return launch(&token_slopes_kernel, slopes, tokens.n, queue);
}

}  // namespace stepkto::cuda
