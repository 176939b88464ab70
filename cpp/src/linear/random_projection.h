// Random matrices S with proj_dim rows and E[S^T S] = I, applied to rows. The weight gradient of a layer is
// estimated from the result. Implemented in ATen ops, for every device. Everything is a function of the arguments and
// of `seed`, a 0-d int64 tensor on the device of the rows, which is never read on the host.
#pragma once

#include <ATen/core/Tensor.h>

#include <string_view>
#include <tuple>

namespace lomem::detail {

/// How the rows are compressed; docs/linear.md has the formulas.
enum class RandomMatmul { gaussian, rademacher, dct, dft, crs, wta_crs };

/// Raises for an unknown name.
RandomMatmul parse_matmul(const char* op, std::string_view name);

/// Whether rows are picked (by their norms, on which S then depends) instead of mixed.
inline bool picks_rows(RandomMatmul matmul) {
  return matmul == RandomMatmul::crs || matmul == RandomMatmul::wta_crs;
}

/// S rows, with shape (proj_dim, cols) and the dtype of `rows`, (rows, cols). Only for methods that mix rows.
/// Precondition: 1 <= proj_dim <= rows.
at::Tensor project_rows(RandomMatmul matmul, const at::Tensor& rows, int64_t proj_dim, const at::Tensor& seed);

/// S rows for methods that pick rows, and the proj_dim indices of the picked rows, int64. Same precondition.
std::tuple<at::Tensor, at::Tensor> pick_rows(
    RandomMatmul matmul, const at::Tensor& rows, int64_t proj_dim, const at::Tensor& seed);

}  // namespace lomem::detail
