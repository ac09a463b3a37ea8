// Python module stepkto_kernels._native. Tensors come as addresses, so that one build serves every
// torch; native.py has checked shapes, dtypes and strides before it calls. The GIL is released.

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <cstdint>

#include "rows_cpu.h"
#include "segments_cpu.h"

namespace py = pybind11;
using namespace stepkto;

namespace {

template <typename T>
T* at(std::uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

Tile make_tile(
    std::uintptr_t x, int64_t n, int64_t v, int64_t stride, std::uintptr_t bias,
    std::uintptr_t target, int64_t v0) {
  return {at<float>(x), n, v, stride, at<const float>(bias), at<const int64_t>(target), v0};
}

FoldState make_state(
    std::uintptr_t top, std::uintptr_t sum, std::uintptr_t target_logit, std::uintptr_t logit_sum,
    std::uintptr_t moment, std::uintptr_t square_sum) {
  return {
      at<float>(top), at<double>(sum), at<float>(target_logit), at<double>(logit_sum),
      at<double>(moment), at<double>(square_sum)};
}

RowGradient make_row(
    std::uintptr_t top, std::uintptr_t logsum, std::uintptr_t logp, std::uintptr_t dlogp,
    std::uintptr_t dentropy, std::uintptr_t entropy) {
  return {
      at<const float>(top), at<const float>(logsum), at<const float>(logp), at<const float>(dlogp),
      at<const float>(dentropy), at<const float>(entropy)};
}

Segments make_segments(
    int64_t N, int64_t B, int64_t S, std::uintptr_t sequence_index, std::uintptr_t step_index,
    std::uintptr_t outcome_label, std::uintptr_t step_label, std::uintptr_t step_sequence) {
  return {
      N, B, S, at<const int32_t>(sequence_index), at<const int32_t>(step_index),
      at<const int8_t>(outcome_label), at<const int8_t>(step_label),
      at<const int32_t>(step_sequence)};
}

LevelSums make_sums(std::uintptr_t ratio, std::uintptr_t logp, std::uintptr_t tokens) {
  return {at<double>(ratio), at<double>(logp), at<double>(tokens)};
}

LossOptions make_loss_options(
    std::array<double, 4> outcome, std::array<double, 4> step, double step_weight,
    int step_reduction, bool length_normalize, double outcome_normalizer, double step_normalizer) {
  const auto level = [](const std::array<double, 4>& x) {
    return KtoLevel{x[0], x[1], x[2], x[3]};
  };
  return {
      level(outcome), level(step), step_weight, static_cast<StepReduction>(step_reduction),
      length_normalize, outcome_normalizer, step_normalizer};
}

}  // namespace

PYBIND11_MODULE(_native, m) {
  m.doc() = "CPU kernels of stepkto_kernels; call them through stepkto_kernels.native";
  using release = py::call_guard<py::gil_scoped_release>;

  py::class_<Tile>(m, "Tile").def(py::init(&make_tile));
  py::class_<FoldState>(m, "FoldState").def(py::init(&make_state));
  py::class_<RowGradient>(m, "RowGradient").def(py::init(&make_row));
  py::class_<LogitOptions>(m, "LogitOptions")
      .def(py::init([](float temperature, float logit_scale, float softcap) {
        return LogitOptions{temperature, logit_scale, softcap};
      }));

  m.def("fold", &fold, release());
  m.def(
      "fold_frozen",
      [](const Tile& tile, const FoldState& state, LogitOptions options, std::uintptr_t rescale,
         int threads) { fold_frozen(tile, state, options, at<float>(rescale), threads); },
      release());
  m.def(
      "finish",
      [](const FoldState& state, int64_t n, std::uintptr_t logp, std::uintptr_t logsum,
         std::uintptr_t entropy, std::uintptr_t log_sum_sq_prob, int threads) {
        finish(
            state, n, at<float>(logp), at<float>(logsum), at<float>(entropy),
            at<float>(log_sum_sq_prob), threads);
      },
      release());
  m.def("dlogits", &dlogits, release());
  py::class_<Segments>(m, "Segments").def(py::init(&make_segments));
  py::class_<LevelSums>(m, "LevelSums").def(py::init(&make_sums));
  py::class_<LossOptions>(m, "LossOptions").def(py::init(&make_loss_options));
  m.def(
      "segment_sums",
      [](const Segments& segments, std::uintptr_t logps, std::uintptr_t ref_logps, double clip_low,
         double clip_high, const LevelSums& outcome, const LevelSums& step) {
        segment_sums(
            segments, at<const float>(logps), at<const float>(ref_logps), clip_low, clip_high,
            outcome, step);
      },
      release());
  m.def(
      "batch_loss",
      [](const Segments& segments, const LevelSums& outcome, const LevelSums& step,
         const LossOptions& options, std::uintptr_t loss, std::uintptr_t totals,
         std::uintptr_t outcome_slope, std::uintptr_t step_slope) {
        batch_loss(
            segments, outcome, step, options, at<double>(loss), at<double>(totals),
            at<double>(outcome_slope), at<double>(step_slope));
      },
      release());
  m.def(
      "token_slopes",
      [](const Segments& segments, std::uintptr_t logps, std::uintptr_t ref_logps, double clip_low,
         double clip_high, std::uintptr_t outcome_slope, std::uintptr_t step_slope, double scale,
         std::uintptr_t g) {
        token_slopes(
            segments, at<const float>(logps), at<const float>(ref_logps), clip_low, clip_high,
            at<const double>(outcome_slope), at<const double>(step_slope), scale, at<float>(g));
      },
      release());
  m.def(
      "exp_array",
      [](std::uintptr_t x, std::uintptr_t out, int64_t n) {
        exp_array(at<const float>(x), at<float>(out), n);
      },
      release());
  m.def(
      "tanh_array",
      [](std::uintptr_t x, std::uintptr_t out, int64_t n) {
        tanh_array(at<const float>(x), at<float>(out), n);
      },
      release());
}
