// Tensors as rows of contiguous elements, which kernels read and write without copies: the halves of one tensor are
// such.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <optional>

namespace lomem::detail {

/// The number of elements from one row to the next, if the last dimension is contiguous and the other ones are as in a
/// row-major tensor. Elements may overlap only if the rows are expanded.
inline std::optional<int64_t> row_stride(const at::Tensor& tensor) {
  const int64_t dim = tensor.dim();
  if (dim == 0 || tensor.numel() == 0) {
    return tensor.numel();
  }
  if (tensor.size(-1) != 1 && tensor.stride(-1) != 1) {
    return std::nullopt;
  }
  std::optional<int64_t> stride;  // of the rows so far
  int64_t rows = 1;
  for (int64_t i = dim - 2; i >= 0; --i) {
    if (tensor.size(i) == 1) {
      continue;
    }
    if (!stride) {
      stride = tensor.stride(i);
    } else if (tensor.stride(i) != *stride * rows) {
      return std::nullopt;
    }
    rows *= tensor.size(i);
  }
  return stride.value_or(tensor.size(-1));
}

/// The tensor if it consists of rows, otherwise a copy that does.
inline at::Tensor with_rows(const at::Tensor& tensor) {
  return row_stride(tensor) ? tensor : tensor.contiguous();
}

/// How elements are grouped: tensors that are all contiguous are one row.
struct RowCount {
  int64_t rows;
  int64_t cols;
};

inline RowCount row_count(const at::Tensor& like, bool all_contiguous) {
  const int64_t n = like.numel();
  if (all_contiguous || n == 0) {
    return {1, n};
  }
  const int64_t cols = like.size(-1);
  return {n / cols, cols};
}

}  // namespace lomem::detail
