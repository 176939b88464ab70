// The rules for arguments, once for every backend. Each error names op, argument, the value it
// got and the value it wants.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/core/SymIntArrayRef.h>
#include <lomem/core/dtype.h>

#include <optional>
#include <vector>

namespace lomem::detail {

/// Precondition: a dtype that a check below has passed.
DType to_dtype(at::ScalarType dtype);

/// A strided tensor of at most so many elements that their bits can be counted.
void check_strided(const char* op, const char* argument, const at::Tensor& tensor);

/// The same, of a supported floating-point dtype.
void check_float_tensor(const char* op, const char* argument, const at::Tensor& tensor);

/// The same, of uint8.
void check_byte_tensor(const char* op, const char* argument, const at::Tensor& tensor);

/// bits in [1, 8].
void check_bits(const char* op, int64_t bits);

/// At most 2^bits - 1 boundaries, ascending, none NaN.
void check_boundaries(const char* op, at::ArrayRef<double> boundaries, int64_t bits);

/// 2^bits - 1 of them: as given, then +infinity, above which nothing is.
std::vector<double> filled_boundaries(at::ArrayRef<double> boundaries, int64_t bits);

void check_step_codes(const at::Tensor& input, at::ArrayRef<double> boundaries, int64_t bits);

void check_band_codes(const at::Tensor& input, double low, double high);

void check_step_backward(
    const at::Tensor& grad_output, const at::Tensor& codes, at::ArrayRef<double> levels, int64_t bits);

void check_unpack(const at::Tensor& packed, int64_t bits, const c10::SymInt& numel);

/// Sizes that follow from an input and its normalized_shape.
struct NormSizes {
  c10::SymInt rows = 1;
  c10::SymInt cols = 1;
  /// Sizes of rstd: the leading dimensions of the input, then ones (as torch's native_layer_norm).
  c10::SymDimVector rstd;
};

/// Checks the arguments of a norm's forward. A norm without bias passes nullopt.
NormSizes check_norm_forward(
    const char* op, const at::Tensor& input, c10::SymIntArrayRef normalized_shape,
    const std::optional<at::Tensor>& weight, const std::optional<at::Tensor>& bias, std::optional<double> eps,
    std::optional<at::ScalarType> dtype);

/// Checks the arguments of a norm's backward.
NormSizes check_norm_backward(
    const char* op, const at::Tensor& grad_output, const at::Tensor& output, const at::Tensor& rstd,
    c10::SymIntArrayRef normalized_shape, const std::optional<at::Tensor>& weight,
    const std::optional<at::Tensor>& bias, at::ScalarType input_dtype);

struct ProjectionSize;

/// Raises where `size` says not how many rows are kept, or nonsense.
void check_projection_size(const char* op, const ProjectionSize& size);

/// Checks the arguments of a linear layer.
void check_linear(
    const char* op, const at::Tensor& input, const at::Tensor& weight, const std::optional<at::Tensor>& bias);

/// Checks a seed, if there is one; `other` is what it must be on the device of.
void check_seed(const char* op, const std::optional<at::Tensor>& seed, const char* other_name, const at::Tensor& other);

/// Checks the further arguments of randomized_linear_forward.
void check_compression(
    const char* op, const at::Tensor& input, const std::optional<at::Tensor>& seed, const c10::SymInt& proj_dim);

/// Checks the arguments of randomized_linear_weight_grad, and returns the number of rows of `grad_output`.
c10::SymInt check_weight_grad(
    const at::Tensor& grad_output, const at::Tensor& compressed, const std::optional<at::Tensor>& indices,
    const at::Tensor& seed, bool picks_rows);

/// Product of all sizes but the last.
c10::SymInt leading_rows(const at::Tensor& tensor);

/// dtype of rstd, and so of a norm's statistics, for an input dtype.
at::ScalarType rstd_dtype(at::ScalarType input_dtype);

/// F.rms_norm's default eps: machine epsilon of the type that the input is computed in.
double default_rms_norm_eps(at::ScalarType input_dtype);

inline bool has_tensor(const std::optional<at::Tensor>& tensor) {
  return tensor.has_value() && tensor->defined();
}

}  // namespace lomem::detail
