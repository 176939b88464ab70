// Gated units on the CPU: torch's ops in tiles, and a kernel for the gradients.
#include <ATen/EmptyTensor.h>
#include <ATen/ops/mul.h>
#include <lomem/cpu/kernels.h>
#include <torch/library.h>

#include "../cpu/parallel.h"
#include "../cpu/value_table.h"
#include "ops.h"
#include "rows.h"

namespace lomem::detail {
namespace {

/// Addresses of a tensor's rows.
template <class Pointer>
struct RowPointer {
  Pointer data;       // char or const char; null if there is no tensor
  int64_t bytes = 0;  // from one row to the next

  Pointer at(int64_t row, int64_t offset) const {
    return data == nullptr ? nullptr : data + row * bytes + offset;
  }
};

RowPointer<const char*> rows_of(const at::Tensor& tensor) {
  return {static_cast<const char*>(tensor.const_data_ptr()), *row_stride(tensor) * tensor.element_size()};
}

RowPointer<char*> mutable_rows_of(const at::Tensor& tensor) {
  if (!tensor.defined()) {
    return {nullptr};
  }
  return {static_cast<char*>(tensor.mutable_data_ptr()), *row_stride(tensor) * tensor.element_size()};
}

/// Calls body(row, begin, end) for ranges of elements that cover all rows.
template <class Body>
void for_ranges(int64_t rows, int64_t cols, const Body& body) {
  if (rows == 1) {
    parallel_over_elements(cols, cache_line_elements, [&](int64_t begin, int64_t end) { body(0, begin, end); });
    return;
  }
  parallel_for(rows, std::max<int64_t>(1, elements_per_thread / cols), [&](int64_t first, int64_t last) {
    for (int64_t row = first; row < last; ++row) {
      body(row, 0, cols);
    }
  });
}

// Values --------------------------------------------------------------------------------------------------------------

/// A 2-D tensor of rows at `data`, which it does not own. (from_blob takes no pointer to const, but operands are not
/// written to.)
at::Tensor rows_at(const char* data, int64_t rows, int64_t cols, int64_t stride, const at::Tensor& like) {
  return at::from_blob(
      const_cast<char*>(data), {rows, cols}, {stride, 1}, at::TensorOptions().dtype(like.scalar_type()));
}

/// Contiguous operands: each tile of the activation is multiplied while it is in the cache.
template <class Function>
at::Tensor contiguous_in_tiles(const at::Tensor& gate, const at::Tensor& up) {
  at::Tensor output(at::detail::empty_cpu(gate.sizes(), gate.scalar_type()));
  const int64_t size = gate.element_size();
  const DType dtype = to_dtype(gate.scalar_type());
  const auto* factor = static_cast<const char*>(up.const_data_ptr());
  auto* y = static_cast<char*>(output.mutable_data_ptr());
  values_in_tiles<Function>(gate, output, [&](int64_t begin, int64_t count) {
    cpu::multiply(dtype, y + begin * size, factor + begin * size, count, y + begin * size);
  });
  return output;
}

/// Rows of 16-bit numbers, looked up.
template <class Function>
at::Tensor rows_by_table(const at::Tensor& gate, const at::Tensor& up) {
  const ValueTable& table = value_table<Function>(gate.scalar_type());
  at::Tensor output(at::detail::empty_cpu(gate.sizes(), gate.scalar_type()));
  const auto [rows, cols] = row_count(gate, gate.is_contiguous() && up.is_contiguous());
  const DType dtype = to_dtype(gate.scalar_type());
  const auto x = rows_of(gate);
  const auto factor = rows_of(up);
  const auto y = mutable_rows_of(output);
  for_ranges(rows, cols, [&, row_bytes = cols * output.element_size()](int64_t row, int64_t begin, int64_t end) {
    const int64_t offset = begin * static_cast<int64_t>(sizeof(uint16_t));
    char* const target = y.data + row * row_bytes + offset;
    look_up(
        table, reinterpret_cast<const uint16_t*>(x.at(row, offset)), end - begin, reinterpret_cast<uint16_t*>(target));
    cpu::multiply(dtype, target, factor.at(row, offset), end - begin, target);
  });
  return output;
}

/// The same for rows. torch's kernels start anew at every row, so tiles of whole rows give the same bits; with at least
/// two rows, so that torch sees the same kind of tensor.
template <class Function>
at::Tensor rows_in_tiles(const at::Tensor& gate, const at::Tensor& up, const Tiling& tiling) {
  at::Tensor output(at::detail::empty_cpu(gate.sizes(), gate.scalar_type()));
  const auto [rows, cols] = row_count(gate, false);
  const int64_t size = gate.element_size();
  const DType dtype = to_dtype(gate.scalar_type());
  const auto x = rows_of(gate);
  const auto factor = rows_of(up);
  const auto y = mutable_rows_of(output);
  const int64_t tile_rows = std::max<int64_t>(2, tile_elements(gate.numel(), tiling) / cols);
  const int64_t tiles = std::max<int64_t>(1, rows / tile_rows);
  at::parallel_for(0, tiles, 1, [&](int64_t first, int64_t last) {
    for (int64_t tile = first; tile < last; ++tile) {
      const int64_t begin = tile * tile_rows;
      const int64_t count = tile + 1 == tiles ? rows - begin : tile_rows;
      at::Tensor target = rows_at(y.at(begin, 0), count, cols, cols, gate);
      Values<Function>::value_out(target, rows_at(x.at(begin, 0), count, cols, x.bytes / size, gate));
      for (int64_t row = begin; row < begin + count; ++row) {
        cpu::multiply(dtype, y.at(row, 0), factor.at(row, 0), cols, y.at(row, 0));
      }
    }
  });
  return output;
}

/// value *= up, where value is contiguous and up consists of rows.
void multiply_in_place(at::Tensor& value, const at::Tensor& up) {
  const auto [rows, cols] = row_count(value, up.is_contiguous());
  const DType dtype = to_dtype(value.scalar_type());
  const auto size = static_cast<int64_t>(element_size(dtype));
  const auto y = mutable_rows_of(value);
  const auto factor = rows_of(up);
  for_ranges(rows, cols, [&, row_bytes = cols * size](int64_t row, int64_t begin, int64_t end) {
    char* const target = y.data + row * row_bytes + begin * size;
    cpu::multiply(dtype, target, factor.at(row, begin * size), end - begin, target);
  });
}

/// Whether the table has torch's values of all elements of rows. oneDNN only computes those of contiguous tensors.
template <class Function>
bool same_in_rows(const at::Tensor& gate) {
  const at::ScalarType dtype = gate.scalar_type();
  return (gate.is_contiguous() || !Values<Function>::alike(dtype)) && value_table<Function>(dtype).everywhere;
}

template <class Function>
at::Tensor gated_values(const at::Tensor& gate, const at::Tensor& up) {
  if (goes_in_tiles<Function>(gate) && up.is_contiguous()) {
    return contiguous_in_tiles<Function>(gate, up);
  }
  // (Rows that overlap are left to torch.)
  const auto in_rows = [&] { return row_stride(gate).value_or(0) >= gate.size(-1) && row_stride(up); };
  if (may_look_up<Function>(gate) && in_rows() && same_in_rows<Function>(gate)) {
    return rows_by_table<Function>(gate, up);
  }
  // (So is a contiguous gate, which torch treats as one row.)
  if (const Tiling tiling = Values<Function>::tiling(gate.scalar_type());
      !gate.is_contiguous() && may_tile(gate.numel(), tiling) && in_rows()) {
    return rows_in_tiles<Function>(gate, up, tiling);
  }
  at::Tensor value = torch_values<Function>(gate);
  if (value.is_contiguous() && row_stride(up)) {
    // (The product has the same strides.)
    multiply_in_place(value, up);
    return value;
  }
  return at::mul(value, up);
}

at::Tensor gated_cpu(
    const at::Tensor& gate, const OptionalTensor& up, std::string_view activation, std::string_view layout) {
  const GatedKind kind = check_gated(ops::gated.name, gate, up, activation, layout);
  const GatedHalves operands = operands_of(gate, up, kind.layout);
  return visit_gated(kind.activation, [&](auto function) {
    return gated_values<typename decltype(function)::type>(operands.gate, operands.up);
  });
}

// Gradients -----------------------------------------------------------------------------------------------------------

/// Writes the gradients of the operands; either may be undefined. All tensors consist of rows.
void compute_gradients(
    GatedActivation activation, const at::Tensor& grad_output, const GatedHalves& operands, const at::Tensor& grad_gate,
    const at::Tensor& grad_up) {
  bool all_contiguous = true;
  for (const at::Tensor* tensor : {&grad_output, &operands.gate, &operands.up, &grad_gate, &grad_up}) {
    all_contiguous = all_contiguous && (!tensor->defined() || tensor->is_contiguous());
  }
  const auto [rows, cols] = row_count(grad_output, all_contiguous);
  const DType dtype = to_dtype(grad_output.scalar_type());
  const auto size = static_cast<int64_t>(element_size(dtype));
  const auto grad = rows_of(grad_output);
  const auto gate = rows_of(operands.gate);
  const auto up = rows_of(operands.up);
  const auto gate_target = mutable_rows_of(grad_gate);
  const auto up_target = mutable_rows_of(grad_up);
  const bool stream = cpu::should_stream(2 * grad_output.nbytes());
  for_ranges(rows, cols, [&](int64_t row, int64_t begin, int64_t end) {
    const int64_t offset = begin * size;
    cpu::gated_backward(
        activation, dtype, grad.at(row, offset), gate.at(row, offset), up.at(row, offset), end - begin,
        gate_target.at(row, offset), up_target.at(row, offset), stream);
  });
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> gated_backward_cpu(
    const at::Tensor& grad_output, const at::Tensor& gate, const OptionalTensor& up, std::string_view activation,
    std::string_view layout, std::array<bool, 3> output_mask) {
  const GatedKind kind = check_gated_backward(ops::gated_backward.name, grad_output, gate, up, activation, layout);
  const auto& [wants_gate, wants_up, wants_output] = output_mask;
  const GatedHalves operands = operands_of(gate, up, kind.layout);
  const auto empty_like_gate = [&](bool wanted) {
    return wanted ? at::Tensor(at::detail::empty_cpu(gate.sizes(), gate.scalar_type())) : at::Tensor();
  };
  at::Tensor grad_gate = empty_like_gate(wants_gate);
  at::Tensor grad_up = empty_like_gate(wants_up && has_tensor(up));
  if (grad_gate.defined() || grad_up.defined()) {
    const GatedHalves sources{with_rows(operands.gate), with_rows(operands.up)};
    const at::Tensor grad = with_rows(grad_output);
    if (has_tensor(up)) {
      compute_gradients(kind.activation, grad, sources, grad_gate, grad_up);
    } else {
      const GatedHalves targets = halves_of(grad_gate, kind.layout);
      if (kind.layout == GatedLayout::interleaved) {
        const at::Tensor of_gate = at::Tensor(at::detail::empty_cpu(grad.sizes(), gate.scalar_type()));
        const at::Tensor of_up = at::Tensor(at::detail::empty_cpu(grad.sizes(), gate.scalar_type()));
        compute_gradients(kind.activation, grad, sources, of_gate, of_up);
        targets.gate.copy_(of_gate);
        targets.up.copy_(of_up);
      } else {
        compute_gradients(kind.activation, grad, sources, targets.gate, targets.up);
      }
    }
  }
  at::Tensor output;
  if (wants_output) {
    output = gated_cpu(gate, up, activation, layout).contiguous();
  }
  return {grad_gate, grad_up, output};
}

TORCH_LIBRARY_IMPL(lomem, CPU, m) {
  m.impl("gated", &gated_cpu);
  m.impl("gated_backward", &gated_backward_cpu);
}

}  // namespace
}  // namespace lomem::detail
