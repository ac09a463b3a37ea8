// Python module stepkto_kernels._native: the CPU kernels on tensors, which are checked here
// (tensors.h). Kernels run without the interpreter's lock.

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <cstdint>
#include <limits>

#include "rows_cpu.h"
#include "segment_tensors.h"
#include "segments_cpu.h"
#include "tensors.h"

namespace py = pybind11;
using namespace stepkto;

namespace {

constexpr int64_t MAX_THREADS = 1024;
constexpr int64_t LARGEST = std::numeric_limits<int64_t>::max();

Tensors cpu_tensors() { return Tensors(Torch::get().cpu); }

int number_of_threads(const py::object& threads) {
  return static_cast<int>(integer("threads", threads, 1, MAX_THREADS));
}

// x (n, v) fp32, bias (v,) fp32 or None, target (n,) int64.
Held<Tile> make_tile(
    const py::object& x, const py::object& bias, const py::object& target, const py::object& v0) {
  Tensors tensors = cpu_tensors();
  const TensorView<float> logits = tensors.rows<float>("x", x);
  const int64_t n = logits.shape[0], v = logits.shape[1];
  const Tile tile = {
      logits.data, n, v, logits.stride[0], tensors.row_or_null<const float>("bias", bias, v),
      tensors.row<const int64_t>("target", target, n), integer("v0", v0, 0, LARGEST - v)};
  return {tile, n, std::move(tensors)};
}

// (n,) each; the last three may be None.
Held<FoldState> make_state(
    const py::object& top, const py::object& sum, const py::object& target_logit,
    const py::object& logit_sum, const py::object& moment, const py::object& square_sum) {
  Tensors tensors = cpu_tensors();
  int64_t n = 0;
  float* const largest = tensors.row_of_any_length<float>("top", top, &n);
  const FoldState state = {
      largest,
      tensors.row<double>("sum", sum, n),
      tensors.row<float>("target_logit", target_logit, n),
      tensors.row_or_null<double>("logit_sum", logit_sum, n),
      tensors.row_or_null<double>("moment", moment, n),
      tensors.row_or_null<double>("square_sum", square_sum, n)};
  return {state, n, std::move(tensors)};
}

// (n,) fp32 each; the last three may be None, entropy where dentropy is.
Held<RowGradient> make_row(
    const py::object& top, const py::object& logsum, const py::object& logp,
    const py::object& dlogp, const py::object& dentropy, const py::object& entropy) {
  Tensors tensors = cpu_tensors();
  int64_t n = 0;
  const float* const largest = tensors.row_of_any_length<const float>("top", top, &n);
  if (!dentropy.is_none() && entropy.is_none())
    refuse("entropy", "a tensor, as dentropy is given", "None");
  const RowGradient row = {
      largest,
      tensors.row<const float>("logsum", logsum, n),
      tensors.row<const float>("logp", logp, n),
      tensors.row_or_null<const float>("dlogp", dlogp, n),
      tensors.row_or_null<const float>("dentropy", dentropy, n),
      tensors.row_or_null<const float>("entropy", entropy, n)};
  return {row, n, std::move(tensors)};
}

// (n,) fp64 each.
Held<LevelSums> make_sums(
    const py::object& ratio, const py::object& logp, const py::object& tokens) {
  Tensors tensors = cpu_tensors();
  int64_t n = 0;
  double* const ratios = tensors.row_of_any_length<double>("ratio", ratio, &n);
  const LevelSums sums = {
      ratios, tensors.row<double>("logp", logp, n), tensors.row<double>("tokens", tokens, n)};
  return {sums, n, std::move(tensors)};
}

// outcome, step: reference point, beta, desirable and undesirable weight.
LossOptions make_loss_options(
    std::array<double, 4> outcome, std::array<double, 4> step, double step_weight,
    const py::object& step_reduction, bool length_normalize, double outcome_normalizer,
    double step_normalizer) {
  const auto level = [](const std::array<double, 4>& x) {
    return KtoLevel{x[0], x[1], x[2], x[3]};
  };
  return {
      level(outcome), level(step), step_weight, reduction(step_reduction), length_normalize,
      outcome_normalizer, step_normalizer};
}

void run_fold(
    const Held<Tile>& tile, const Held<FoldState>& state, const LogitOptions& options,
    const py::object& threads) {
  same_length("state", state.n, tile.n);
  const int team = number_of_threads(threads);
  unlocked([&] { fold(tile.value, state.value, options, team); });
}

void run_fold_frozen(
    const Held<Tile>& tile, const Held<FoldState>& state, const LogitOptions& options,
    const py::object& rescale, const py::object& threads) {
  same_length("state", state.n, tile.n);
  Tensors out = cpu_tensors();
  float* const factors = out.row<float>("rescale", rescale, tile.n);
  const int team = number_of_threads(threads);
  unlocked([&] { fold_frozen(tile.value, state.value, options, factors, team); });
}

void run_finish(
    const Held<FoldState>& state, const py::object& logp, const py::object& logsum,
    const py::object& entropy, const py::object& log_sum_sq_prob, const py::object& threads) {
  const int64_t n = state.n;
  if (!entropy.is_none() && state.value.moment == nullptr)
    refuse("entropy", "None, as state has no moment", "a tensor");
  if (!log_sum_sq_prob.is_none() && state.value.square_sum == nullptr)
    refuse("log_sum_sq_prob", "None, as state has no square_sum", "a tensor");
  Tensors out = cpu_tensors();
  float* const rows[] = {
      out.row<float>("logp", logp, n), out.row<float>("logsum", logsum, n),
      out.row_or_null<float>("entropy", entropy, n),
      out.row_or_null<float>("log_sum_sq_prob", log_sum_sq_prob, n)};
  const int team = number_of_threads(threads);
  unlocked([&] { finish(state.value, n, rows[0], rows[1], rows[2], rows[3], team); });
}

void run_dlogits(
    const Held<Tile>& tile, const Held<RowGradient>& row, const LogitOptions& options,
    const py::object& threads) {
  same_length("row", row.n, tile.n);
  const int team = number_of_threads(threads);
  unlocked([&] { dlogits(tile.value, row.value, options, team); });
}

void run_segment_sums(
    const Held<Segments>& segments, const py::object& logps, const py::object& ref_logps,
    double clip_low, double clip_high, const Held<LevelSums>& outcome, const Held<LevelSums>& step) {
  same_length("outcome", outcome.n, segments.value.B);
  same_length("step", step.n, segments.value.S);
  Tensors tensors = cpu_tensors();
  const float* const policy = tensors.row<const float>("logps", logps, segments.n);
  const float* const reference = tensors.row<const float>("ref_logps", ref_logps, segments.n);
  unlocked([&] {
    segment_sums(
        segments.value, policy, reference, clip_low, clip_high, outcome.value, step.value);
  });
}

void run_batch_loss(
    const Held<Segments>& segments, const Held<LevelSums>& outcome, const Held<LevelSums>& step,
    const LossOptions& options, const py::object& loss, const py::object& totals,
    const py::object& outcome_slope, const py::object& step_slope) {
  const int64_t B = segments.value.B, S = segments.value.S;
  same_length("outcome", outcome.n, B);
  same_length("step", step.n, S);
  Tensors out = cpu_tensors();
  double* const value = out.scalar<double>("loss", loss);
  double* const sums = out.row<double>("totals", totals, NUM_TOTALS);
  double* const slopes[] = {
      out.row<double>("outcome_slope", outcome_slope, B),
      out.row<double>("step_slope", step_slope, S)};
  unlocked([&] {
    batch_loss(
        segments.value, outcome.value, step.value, options, value, sums, slopes[0], slopes[1]);
  });
}

void run_token_slopes(
    const Held<Segments>& segments, const py::object& logps, const py::object& ref_logps,
    double clip_low, double clip_high, const py::object& outcome_slope,
    const py::object& step_slope, double scale, const py::object& g) {
  Tensors tensors = cpu_tensors();
  const float* const policy = tensors.row<const float>("logps", logps, segments.n);
  const float* const reference = tensors.row<const float>("ref_logps", ref_logps, segments.n);
  const double* const slopes[] = {
      tensors.row<const double>("outcome_slope", outcome_slope, segments.value.B),
      tensors.row<const double>("step_slope", step_slope, segments.value.S)};
  float* const out = tensors.row<float>("g", g, segments.n);
  unlocked([&] {
    token_slopes(
        segments.value, policy, reference, clip_low, clip_high, slopes[0], slopes[1], scale, out);
  });
}

// A function of each element of x (n,) fp32, into out.
template <void (*function)(const float*, float*, int64_t)>
void run_array(const py::object& x, const py::object& out) {
  Tensors tensors = cpu_tensors();
  int64_t n = 0;
  const float* const from = tensors.row_of_any_length<const float>("x", x, &n);
  float* const to = tensors.row<float>("out", out, n);
  unlocked([&] { function(from, to, n); });
}

}  // namespace

PYBIND11_MODULE(_native, m) {
  m.doc() = "CPU kernels of stepkto_kernels; call them through stepkto_kernels.native";
  Torch::get();

  // module_local: _cuda has a Segments too, and tests load several builds
  const auto local = py::module_local();
  py::class_<Held<Tile>>(m, "Tile", local).def(py::init(&make_tile));
  py::class_<Held<FoldState>>(m, "FoldState", local).def(py::init(&make_state));
  py::class_<Held<RowGradient>>(m, "RowGradient", local).def(py::init(&make_row));
  py::class_<LogitOptions>(m, "LogitOptions", local)
      .def(py::init([](float temperature, float logit_scale, float softcap) {
        return LogitOptions{temperature, logit_scale, softcap};
      }));
  m.def("fold", &run_fold);
  m.def("fold_frozen", &run_fold_frozen);
  m.def("finish", &run_finish);
  m.def("dlogits", &run_dlogits);

  py::class_<Held<Segments>>(m, "Segments", local).def(py::init([](
      const py::object& sequence_index, const py::object& step_index,
      const py::object& outcome_label, const py::object& step_label,
      const py::object& step_sequence) {
    const SegmentTensors index = {
        sequence_index, step_index, outcome_label, step_label, step_sequence};
    Held<Segments> segments = make_segments(index, cpu_tensors());
    check_values(segments.value);
    return segments;
  }));
  py::class_<Held<LevelSums>>(m, "LevelSums", local).def(py::init(&make_sums));
  py::class_<LossOptions>(m, "LossOptions", local).def(py::init(&make_loss_options));
  m.def("segment_sums", &run_segment_sums);
  m.def("batch_loss", &run_batch_loss);
  m.def("token_slopes", &run_token_slopes);

  m.def("exp_array", &run_array<&exp_array>);
  m.def("tanh_array", &run_array<&tanh_array>);
}
