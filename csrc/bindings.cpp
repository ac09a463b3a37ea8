// Python module stepkto_kernels._native. Tensors come as addresses, so that one build serves every
// torch; native.py has checked shapes, dtypes and strides before it calls. The GIL is released.

#include <pybind11/pybind11.h>

#include <cstdint>

#include "rows_cpu.h"

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
