// The operands of a gated unit as two tensors.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/ops/narrow.h>
#include <ATen/ops/slice.h>
#include <lomem/core/gated.h>

#include <optional>

#include "../checks.h"

namespace lomem::detail {

struct GatedHalves {
  at::Tensor gate;
  at::Tensor up;
};

/// Views of both operands where `gate` holds both of them, in the same layout.
inline GatedHalves halves_of(const at::Tensor& both, GatedLayout layout) {
  if (layout == GatedLayout::interleaved) {
    return {at::slice_symint(both, -1, 0, std::nullopt, 2), at::slice_symint(both, -1, 1, std::nullopt, 2)};
  }
  const c10::SymInt half = both.sym_size(-1) / 2;
  at::Tensor first = at::narrow_symint(both, -1, 0, half);
  at::Tensor second = at::narrow_symint(both, -1, half, half);
  return layout == GatedLayout::gate_up ? GatedHalves{first, second} : GatedHalves{second, first};
}

inline GatedHalves operands_of(const at::Tensor& gate, const std::optional<at::Tensor>& up, GatedLayout layout) {
  return has_tensor(up) ? GatedHalves{gate, *up} : halves_of(gate, layout);
}

}  // namespace lomem::detail
