// Segments of tensors, for the bindings of both devices.
#pragma once

#include "segments_cpu.h"
#include "tensors.h"

namespace stepkto {

// The fields of segments.SegmentIndex.
struct SegmentTensors {
  const py::object &sequence_index, &step_index, &outcome_label, &step_label, &step_sequence;
};

// Shapes and dtypes are checked, values are not. n is N.
inline Held<Segments> make_segments(const SegmentTensors& x, Tensors tensors) {
  int64_t N = 0, B = 0, S = 0;
  const auto* const sequence_index =
      tensors.row_of_any_length<const int32_t>("sequence_index", x.sequence_index, &N);
  const auto* const outcome_label =
      tensors.row_of_any_length<const int8_t>("outcome_label", x.outcome_label, &B);
  const auto* const step_label =
      tensors.row_of_any_length<const int8_t>("step_label", x.step_label, &S);
  const Segments segments = {
      N, B, S, sequence_index, tensors.row<const int32_t>("step_index", x.step_index, N),
      outcome_label, step_label, tensors.row<const int32_t>("step_sequence", x.step_sequence, S)};
  return {segments, N, std::move(tensors)};
}

template <typename T>
void check_range(const char* name, const T* values, int64_t n, int64_t end) {
  bool inside = true;  // no early exit, so that the loop is vectorised
  for (int64_t i = 0; i < n; ++i) inside &= values[i] >= -1 && values[i] < end;
  if (inside) return;
  for (int64_t i = 0; i < n; ++i)
    if (values[i] < -1 || values[i] >= end)
      refuse(
          std::string(name) + "[" + std::to_string(i) + "]",
          "a value in [-1, " + std::to_string(end) + ")",
          std::to_string(static_cast<int64_t>(values[i])));
}

// The CPU kernels write where indices and labels point, so those have to point inside.
inline void check_values(const Segments& s) {
  check_range("sequence_index", s.sequence_index, s.N, s.B);
  check_range("step_index", s.step_index, s.N, s.S);
  check_range("outcome_label", s.outcome_label, s.B, 2);
  check_range("step_label", s.step_label, s.S, 2);
  check_range("step_sequence", s.step_sequence, s.S, s.B);
}

inline StepReduction reduction(const py::object& value) {
  return static_cast<StepReduction>(integer("step_reduction", value, 0, 2));
}

}  // namespace stepkto
