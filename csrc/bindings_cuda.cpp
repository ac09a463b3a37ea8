// Python module stepkto_kernels._cuda. Tensors come as addresses, so that one build serves every
// torch; cuda.py has checked shapes, dtypes and strides before it calls. The GIL is released.

#include <cuda_runtime.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <cstdint>
#include <stdexcept>
#include <string>

#include "step_kto_cuda.h"

namespace py = pybind11;
using namespace stepkto;

namespace {

template <typename T>
T* at(std::uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

void check(const char* name, int code) {
  if (code == cudaSuccess) return;
  const char* reason = cudaGetErrorString(static_cast<cudaError_t>(code));
  throw std::runtime_error(std::string(name) + ": " + reason);
}

Segments make_segments(
    int64_t N, int64_t B, int64_t S, std::uintptr_t sequence_index, std::uintptr_t step_index,
    std::uintptr_t outcome_label, std::uintptr_t step_label, std::uintptr_t step_sequence) {
  return {
      N, B, S, at<const int32_t>(sequence_index), at<const int32_t>(step_index),
      at<const int8_t>(outcome_label), at<const int8_t>(step_label),
      at<const int32_t>(step_sequence)};
}

cuda::Tokens make_tokens(
    int64_t n, std::uintptr_t rows, std::uintptr_t logps, std::uintptr_t ref_logps,
    double clip_low, double clip_high) {
  return {
      n, at<const int64_t>(rows), at<const float>(logps), at<const float>(ref_logps), clip_low,
      clip_high};
}

// outcome, step: beta, desirable and undesirable weight.
cuda::Loss make_loss(
    std::array<double, 3> outcome, std::array<double, 3> step, double step_weight,
    int step_reduction, bool length_normalize, std::uintptr_t z_o, std::uintptr_t z_s,
    std::uintptr_t n_o, std::uintptr_t n_s, bool matched, std::uintptr_t loss,
    std::uintptr_t totals, std::uintptr_t outcome_slope, std::uintptr_t step_slope) {
  const auto level = [](const std::array<double, 3>& x) {
    return KtoLevel{0.0, x[0], x[1], x[2]};
  };
  return {
      {level(outcome), level(step), step_weight, static_cast<StepReduction>(step_reduction),
       length_normalize, 0.0, 0.0},
      at<const double>(z_o), at<const double>(z_s), at<const double>(n_o), at<const double>(n_s),
      matched, at<double>(loss), at<double>(totals), at<double>(outcome_slope),
      at<double>(step_slope)};
}

}  // namespace

PYBIND11_MODULE(_cuda, m) {
  m.doc() = "CUDA kernels of stepkto_kernels; call them through stepkto_kernels.cuda";
  using release = py::call_guard<py::gil_scoped_release>;

  // module_local: _native has a Segments too
  py::class_<Segments>(m, "Segments", py::module_local()).def(py::init(&make_segments));
  py::class_<cuda::Tokens>(m, "Tokens", py::module_local()).def(py::init(&make_tokens));
  py::class_<cuda::Loss>(m, "Loss", py::module_local()).def(py::init(&make_loss));
  py::class_<cuda::Queue>(m, "Queue", py::module_local())
      .def(py::init([](int device, std::uintptr_t stream) {
        return cuda::Queue{device, at<void>(stream)};
      }))
      .def_property_readonly("stream", [](const cuda::Queue& queue) {
        return reinterpret_cast<std::uintptr_t>(queue.stream);
      });

  m.def("workspace_words", &cuda::workspace_words);
  m.def(
      "forward",
      [](const Segments& segments, const cuda::Tokens& tokens, const cuda::Loss& loss,
         std::uintptr_t workspace, std::uintptr_t sums, cuda::Queue queue) {
        const int code = cuda::forward(
            segments, tokens, loss, at<int64_t>(workspace), at<double>(sums), queue);
        check("stepkto forward", code);
      },
      release());
  m.def(
      "segment_sums",
      [](const Segments& segments, const cuda::Tokens& tokens, std::uintptr_t workspace,
         cuda::Queue queue) {
        const int code = cuda::segment_sums(segments, tokens, at<int64_t>(workspace), queue);
        check("stepkto segment_sums", code);
      },
      release());
  m.def(
      "read_sums",
      [](const Segments& segments, std::uintptr_t workspace, std::uintptr_t sums,
         cuda::Queue queue) {
        const int code =
            cuda::read_sums(segments, at<int64_t>(workspace), at<double>(sums), queue);
        check("stepkto read_sums", code);
      },
      release());
  m.def(
      "batch_loss",
      [](const Segments& segments, const cuda::Loss& loss, std::uintptr_t workspace,
         std::uintptr_t sums, cuda::Queue queue) {
        const int code = cuda::batch_loss(
            segments, loss, at<int64_t>(workspace), at<double>(sums), queue);
        check("stepkto batch_loss", code);
      },
      release());
  m.def(
      "token_slopes",
      [](const Segments& segments, const cuda::Tokens& tokens, std::uintptr_t outcome_slope,
         std::uintptr_t step_slope, std::uintptr_t scale, double factor, std::uintptr_t g,
         cuda::Queue queue) {
        const int code = cuda::token_slopes(
            segments, tokens, at<const double>(outcome_slope), at<const double>(step_slope),
            at<const float>(scale), factor, at<float>(g), queue);
        check("stepkto token_slopes", code);
      },
      release());
}
