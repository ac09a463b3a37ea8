// Python module stepkto_kernels._cuda: the CUDA kernels on tensors, whose shapes, dtypes, strides and
// devices are checked here (tensors.h). Values are not, which would wait for the device: the kernels
// answer an index past its end with NaN. Launches happen without the interpreter's lock.

#include <cuda_runtime.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <cstdint>
#include <functional>
#include <initializer_list>
#include <stdexcept>
#include <string>

#include "segment_tensors.h"
#include "step_kto_cuda.h"
#include "tensors.h"

namespace py = pybind11;
using namespace stepkto;

namespace {

// Where to launch, and the device that all tensors of a call have to be on.
struct TensorQueue {
  cuda::Queue queue;
  py::object device;
};

TensorQueue make_queue(const py::object& device, std::uintptr_t stream) {
  const py::object index = device.attr("index");
  const int number = index.is_none() ? 0 : index.cast<int>();
  return {{number, reinterpret_cast<void*>(stream)}, device};
}

void run(const char* name, const std::function<int()>& launch) {
  const int code = unlocked(launch);
  if (code == cudaSuccess) return;
  const char* reason = cudaGetErrorString(static_cast<cudaError_t>(code));
  throw std::runtime_error(std::string(name) + ": " + reason);
}

// rows (n,) int64 or None, logps and ref_logps (n,) fp32.
Held<cuda::Tokens> make_tokens(
    const py::object& rows, const py::object& logps, const py::object& ref_logps, double clip_low,
    double clip_high) {
  Tensors tensors;
  int64_t n = 0;
  const float* const policy = tensors.row_of_any_length<const float>("logps", logps, &n);
  const float* const reference = tensors.row<const float>("ref_logps", ref_logps, n);
  const int64_t* const positions = tensors.row_or_null<const int64_t>("rows", rows, n);
  return {{n, positions, policy, reference, clip_low, clip_high}, n, std::move(tensors)};
}

// outcome, step: beta, desirable and undesirable weight; z, normalizers and loss () fp64, the others
// (len(TOTALS),), (B,) and (S,) fp64. n is B + S.
Held<cuda::Loss> make_loss(
    std::array<double, 3> outcome, std::array<double, 3> step, double step_weight,
    const py::object& step_reduction, bool length_normalize, const py::object& z_o,
    const py::object& z_s, const py::object& n_o, const py::object& n_s, bool matched,
    const py::object& loss, const py::object& totals, const py::object& outcome_slope,
    const py::object& step_slope) {
  const auto level = [](const std::array<double, 3>& x) {
    return KtoLevel{0.0, x[0], x[1], x[2]};
  };
  Tensors tensors;
  int64_t B = 0, S = 0;
  double* const outcome_slopes =
      tensors.row_of_any_length<double>("outcome_slope", outcome_slope, &B);
  double* const step_slopes = tensors.row_of_any_length<double>("step_slope", step_slope, &S);
  const cuda::Loss out = {
      {level(outcome), level(step), step_weight, reduction(step_reduction), length_normalize, 0.0,
       0.0},
      tensors.scalar<const double>("baseline.outcome", z_o),
      tensors.scalar<const double>("baseline.step", z_s),
      tensors.scalar<const double>("normalizer.outcome", n_o),
      tensors.scalar<const double>("normalizer.step", n_s),
      matched,
      tensors.scalar<double>("loss", loss),
      tensors.row<double>("totals", totals, NUM_TOTALS),
      outcome_slopes,
      step_slopes};
  return {out, B + S, std::move(tensors)};
}

void same_tokens(const Held<Segments>& segments, const Held<cuda::Tokens>& tokens) {
  if (tokens.value.rows == nullptr) same_length("logps", tokens.n, segments.n);
}

int64_t num_segments(const Held<Segments>& segments) {
  return segments.value.B + segments.value.S;
}

int64_t* workspace_of(Tensors& tensors, const Held<Segments>& segments, const py::object& x) {
  int64_t words = 0;
  auto* const data = tensors.row_of_any_length<int64_t>("workspace", x, &words);
  const int64_t want = cuda::workspace_words(segments.value.B, segments.value.S);
  if (words < want)
    refuse("workspace", std::to_string(want) + " words or more", std::to_string(words));
  return data;
}

// (3 * (B + S),) fp64
double* sums_of(Tensors& tensors, const Held<Segments>& segments, const py::object& x) {
  return tensors.row<double>("sums", x, 3 * num_segments(segments));
}

void on_device(const TensorQueue& queue, std::initializer_list<const Tensors*> arguments) {
  for (const Tensors* tensors : arguments) tensors->require_device("tensors", queue.device);
}

void run_forward(
    const Held<Segments>& segments, const Held<cuda::Tokens>& tokens, const Held<cuda::Loss>& loss,
    const py::object& workspace, const py::object& sums, const TensorQueue& queue) {
  Tensors out(queue.device);
  same_tokens(segments, tokens);
  same_length("loss", loss.n, num_segments(segments));
  int64_t* const words = workspace_of(out, segments, workspace);
  double* const values = sums_of(out, segments, sums);
  on_device(queue, {&segments.tensors, &tokens.tensors, &loss.tensors});
  run("stepkto forward", [&] {
    return cuda::forward(segments.value, tokens.value, loss.value, words, values, queue.queue);
  });
}

void run_segment_sums(
    const Held<Segments>& segments, const Held<cuda::Tokens>& tokens, const py::object& workspace,
    const TensorQueue& queue) {
  Tensors out(queue.device);
  same_tokens(segments, tokens);
  int64_t* const words = workspace_of(out, segments, workspace);
  on_device(queue, {&segments.tensors, &tokens.tensors});
  run("stepkto segment_sums", [&] {
    return cuda::segment_sums(segments.value, tokens.value, words, queue.queue);
  });
}

void run_read_sums(
    const Held<Segments>& segments, const py::object& workspace, const py::object& sums,
    const TensorQueue& queue) {
  Tensors out(queue.device);
  int64_t* const words = workspace_of(out, segments, workspace);
  double* const values = sums_of(out, segments, sums);
  on_device(queue, {&segments.tensors});
  run("stepkto read_sums",
      [&] { return cuda::read_sums(segments.value, words, values, queue.queue); });
}

void run_batch_loss(
    const Held<Segments>& segments, const Held<cuda::Loss>& loss, const py::object& workspace,
    const py::object& sums, const TensorQueue& queue) {
  Tensors out(queue.device);
  same_length("loss", loss.n, num_segments(segments));
  int64_t* const words = workspace_of(out, segments, workspace);
  double* const values = sums_of(out, segments, sums);
  on_device(queue, {&segments.tensors, &loss.tensors});
  run("stepkto batch_loss",
      [&] { return cuda::batch_loss(segments.value, loss.value, words, values, queue.queue); });
}

void run_token_slopes(
    const Held<Segments>& segments, const Held<cuda::Tokens>& tokens,
    const py::object& outcome_slope, const py::object& step_slope, const py::object& scale,
    double factor, const py::object& g, const TensorQueue& queue) {
  Tensors out(queue.device);
  same_tokens(segments, tokens);
  const double* const slopes[] = {
      out.row<const double>("outcome_slope", outcome_slope, segments.value.B),
      out.row<const double>("step_slope", step_slope, segments.value.S)};
  const float* const upstream =
      scale.is_none() ? nullptr : out.scalar<const float>("scale", scale);
  float* const gradient = out.row<float>("g", g, tokens.n);
  on_device(queue, {&segments.tensors, &tokens.tensors});
  run("stepkto token_slopes", [&] {
    return cuda::token_slopes(
        segments.value, tokens.value, slopes[0], slopes[1], upstream, factor, gradient,
        queue.queue);
  });
}

}  // namespace

PYBIND11_MODULE(_cuda, m) {
  m.doc() = "CUDA kernels of stepkto_kernels; call them through stepkto_kernels.cuda";
  Torch::get();

  // module_local: _native has a Segments too
  py::class_<Held<Segments>>(m, "Segments", py::module_local()).def(py::init([](
      const py::object& sequence_index, const py::object& step_index,
      const py::object& outcome_label, const py::object& step_label,
      const py::object& step_sequence) {
    const SegmentTensors index = {
        sequence_index, step_index, outcome_label, step_label, step_sequence};
    return make_segments(index, Tensors());
  }));
  py::class_<Held<cuda::Tokens>>(m, "Tokens", py::module_local()).def(py::init(&make_tokens));
  py::class_<Held<cuda::Loss>>(m, "Loss", py::module_local()).def(py::init(&make_loss));
  py::class_<TensorQueue>(m, "Queue", py::module_local())
      .def(py::init(&make_queue))
      .def_property_readonly("stream", [](const TensorQueue& queue) {
        return reinterpret_cast<std::uintptr_t>(queue.queue.stream);
      });

  m.def("workspace_words", &cuda::workspace_words);
  m.def("forward", &run_forward);
  m.def("segment_sums", &run_segment_sums);
  m.def("read_sums", &run_read_sums);
  m.def("batch_loss", &run_batch_loss);
  m.def("token_slopes", &run_token_slopes);
}
