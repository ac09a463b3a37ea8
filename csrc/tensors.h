// Tensors of torch at the boundary between Python and the kernels.
//
// There is no libtorch here, so that one build serves every torch: a tensor is looked at through its
// Python attributes and must be what the kernel will walk through, all of it in memory. Anything else
// is a ValueError that names the argument, what was wanted and what was got.
//
// A tensor costs about half a microsecond, so attributes are asked for by interned names, once each.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

namespace stepkto {

namespace py = pybind11;

[[noreturn]] inline void refuse(
    const std::string& name, const std::string& want, const std::string& got) {
  throw py::value_error(name + ": want " + want + ", got " + got);
}

inline std::string text(py::handle value) { return py::cast<std::string>(py::str(value)); }

// What tensors are compared with, and names of their attributes. Made when a module is loaded and
// never destroyed, as the interpreter may end first.
struct Torch {
  py::object tensor, strided, float32, float64, int8, int32, int64, cpu;
  py::object layout, dtype, device, shape, stride, storage_offset, data_ptr, storage, nbytes;

  static const Torch& get() {
    static const Torch* torch = new Torch(py::module_::import("torch"));
    return *torch;
  }

 private:
  static py::object interned(const char* name) {
    return py::reinterpret_steal<py::object>(PyUnicode_InternFromString(name));
  }

  explicit Torch(const py::module_& torch)
      : tensor(torch.attr("Tensor")),
        strided(torch.attr("strided")),
        float32(torch.attr("float32")),
        float64(torch.attr("float64")),
        int8(torch.attr("int8")),
        int32(torch.attr("int32")),
        int64(torch.attr("int64")),
        cpu(torch.attr("device")("cpu")),
        layout(interned("layout")),
        dtype(interned("dtype")),
        device(interned("device")),
        shape(interned("shape")),
        stride(interned("stride")),
        storage_offset(interned("storage_offset")),
        data_ptr(interned("data_ptr")),
        storage(interned("untyped_storage")),
        nbytes(interned("nbytes")) {}
};

template <typename T>
const py::object& dtype_of() {
  const Torch& torch = Torch::get();
  if constexpr (std::is_same_v<T, float>) return torch.float32;
  if constexpr (std::is_same_v<T, double>) return torch.float64;
  if constexpr (std::is_same_v<T, int8_t>) return torch.int8;
  if constexpr (std::is_same_v<T, int32_t>) return torch.int32;
  if constexpr (std::is_same_v<T, int64_t>) return torch.int64;
}

inline py::object attribute(const py::object& x, const py::object& name) {
  PyObject* value = PyObject_GetAttr(x.ptr(), name.ptr());
  if (value == nullptr) throw py::error_already_set();
  return py::reinterpret_steal<py::object>(value);
}

inline py::object call(const py::object& x, const py::object& name) {
  PyObject* value = PyObject_CallMethodNoArgs(x.ptr(), name.ptr());
  if (value == nullptr) throw py::error_already_set();
  return py::reinterpret_steal<py::object>(value);
}

// A Python int, here one of torch's own.
inline int64_t number(const py::object& x) {
  const long long value = PyLong_AsLongLong(x.ptr());
  if (value == -1 && PyErr_Occurred()) throw py::error_already_set();
  return value;
}

inline int64_t number_at(const py::object& tuple, Py_ssize_t i) {
  const long long value = PyLong_AsLongLong(PyTuple_GetItem(tuple.ptr(), i));
  if (value == -1 && PyErr_Occurred()) throw py::error_already_set();
  return value;
}

// A tensor of dtype T (const or not) with its sizes and strides, in elements.
template <typename T>
struct TensorView {
  T* data;
  int64_t shape[2] = {1, 1}, stride[2] = {0, 0};
  py::object device;
};

// Checked: a strided tensor of dtype T on `device` (null: any) whose elements, as far as the strides
// reach, are in its storage. The kernels go by the strides, so that keeps them inside.
template <typename T>
TensorView<T> view(const char* name, const py::object& x, int ndim, const py::object& device) {
  const Torch& torch = Torch::get();
  if (!py::isinstance(x, torch.tensor))
    refuse(name, "a torch.Tensor", text(py::type::of(x).attr("__name__")));
  const py::object layout = attribute(x, torch.layout), dtype = attribute(x, torch.dtype);
  if (!layout.is(torch.strided)) refuse(name, "a dense tensor", text(layout));
  const py::object& want = dtype_of<std::remove_const_t<T>>();
  if (!dtype.is(want)) refuse(name, "dtype " + text(want), text(dtype));
  TensorView<T> out;
  out.device = attribute(x, torch.device);
  if (device && !device.equal(out.device)) refuse(name, "device " + text(device), text(out.device));
  const py::object shape = attribute(x, torch.shape), stride = call(x, torch.stride);
  if (PyTuple_Size(shape.ptr()) != ndim)
    refuse(name, std::to_string(ndim) + " dimensions", "shape " + text(py::tuple(shape)));
  int64_t last = number(call(x, torch.storage_offset)), elements = 1;
  bool inside = true, empty = false;
  for (int i = 0; i < ndim; ++i) {
    int64_t reach = 0;
    out.shape[i] = number_at(shape, i);
    out.stride[i] = number_at(stride, i);
    empty = empty || out.shape[i] == 0;
    inside = inside && !__builtin_mul_overflow(out.shape[i] - 1, out.stride[i], &reach) &&
             !__builtin_add_overflow(last, reach, &last);
  }
  static double nothing;  // null stands for None
  out.data = reinterpret_cast<T*>(&nothing);
  if (empty) return out;
  inside = inside && !__builtin_add_overflow(last, 1, &elements);
  try {
    out.data = reinterpret_cast<T*>(number(call(x, torch.data_ptr)));
    const int64_t bytes = number(call(call(x, torch.storage), torch.nbytes));
    inside = inside && elements <= bytes / static_cast<int64_t>(sizeof(T));
  } catch (const py::error_already_set&) {  // a tensor that stands for one, as in a compiled graph
    out.data = nullptr;
  }
  if (out.data == nullptr || !inside)
    refuse(name, "a tensor with all of its elements in memory", "one without");
  return out;
}

// The tensors that a kernel's arguments point into: kept for as long as those, all on one device.
class Tensors {
 public:
  Tensors() = default;
  explicit Tensors(py::object device) : device_(std::move(device)) {}

  // Address of x (n,), contiguous.
  template <typename T>
  T* row(const char* name, const py::object& x, int64_t n) {
    int64_t length = 0;
    T* const data = row_of_any_length<T>(name, x, &length);
    if (length != n)
      refuse(name, "shape (" + std::to_string(n) + ",)", "(" + std::to_string(length) + ",)");
    return data;
  }

  // The same of any length, which is written to n.
  template <typename T>
  T* row_of_any_length(const char* name, const py::object& x, int64_t* n) {
    const TensorView<T> seen = add<T>(name, x, 1);
    *n = seen.shape[0];
    if (*n > 1 && seen.stride[0] != 1)
      refuse(name, "a contiguous tensor", "stride " + std::to_string(seen.stride[0]));
    return seen.data;
  }

  // Address of x (n,), null for None.
  template <typename T>
  T* row_or_null(const char* name, const py::object& x, int64_t n) {
    return x.is_none() ? nullptr : row<T>(name, x, n);
  }

  // Address of x ().
  template <typename T>
  T* scalar(const char* name, const py::object& x) {
    return add<T>(name, x, 0).data;
  }

  // x (n, v) whose rows are contiguous and do not overlap.
  template <typename T>
  TensorView<T> rows(const char* name, const py::object& x) {
    TensorView<T> seen = add<T>(name, x, 2);
    const int64_t n = seen.shape[0], v = seen.shape[1];
    if ((v > 1 && seen.stride[1] != 1) || (n > 1 && seen.stride[0] < v))
      refuse(
          name, "rows that are contiguous and apart",
          "strides " + std::to_string(seen.stride[0]) + ", " + std::to_string(seen.stride[1]));
    return seen;
  }

  void require_device(const char* name, const py::object& want) const {
    if (device_ && !device_.equal(want)) refuse(name, "device " + text(want), text(device_));
  }

 private:
  template <typename T>
  TensorView<T> add(const char* name, const py::object& x, int ndim) {
    TensorView<T> seen = view<T>(name, x, ndim, device_);
    device_ = seen.device;
    held_.push_back(x);
    return seen;
  }

  std::vector<py::object> held_;
  py::object device_;  // null where there are no tensors
};

// Arguments of a kernel as Python holds them. n: rows, tokens or segments, as the kernel has it.
template <typename T>
struct Held {
  T value;
  int64_t n;
  Tensors tensors;
};

// A Python integer in [low, high].
inline int64_t integer(const char* name, const py::object& x, int64_t low, int64_t high) {
  int overflow = 0;
  long long value = 0;
  const bool whole = PyLong_Check(x.ptr());
  if (whole) value = PyLong_AsLongLongAndOverflow(x.ptr(), &overflow);
  if (!whole || overflow != 0 || value < low || value > high)
    refuse(
        name, "an int in [" + std::to_string(low) + ", " + std::to_string(high) + "]",
        text(py::repr(x)));
  return value;
}

inline void same_length(const char* name, int64_t n, int64_t want) {
  if (n != want) refuse(name, std::to_string(want) + " rows", std::to_string(n));
}

// Runs a kernel without the interpreter's lock.
template <typename Kernel>
auto unlocked(Kernel&& kernel) {
  py::gil_scoped_release release;
  return std::forward<Kernel>(kernel)();
}

}  // namespace stepkto
