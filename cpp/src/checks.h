// Argument checks, shared by all backends. Each error names the op, the argument, its value and the expected value.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/core/SymIntArrayRef.h>
#include <lomem/core/dtype.h>
#include <lomem/core/gated.h>
#include <lomem/core/storage.h>

#include <optional>
#include <string_view>
#include <vector>

namespace lomem::detail {

/// Precondition: `dtype` has passed one of the checks below.
DType to_dtype(at::ScalarType dtype);

/// A strided tensor with few enough elements that the number of their bits fits int64.
void check_strided(const char* op, const char* argument, const at::Tensor& tensor);

/// The same, and a supported floating-point dtype.
void check_float_tensor(const char* op, const char* argument, const at::Tensor& tensor);

/// The same as check_strided, and dtype uint8.
void check_byte_tensor(const char* op, const char* argument, const at::Tensor& tensor);

/// bits must be in [1, 8].
void check_bits(const char* op, int64_t bits);

/// There must be at most 2^bits - 1 boundaries, ascending, none of them NaN.
void check_boundaries(const char* op, at::ArrayRef<double> boundaries, int64_t bits);

/// The given boundaries, padded to 2^bits - 1 with +infinity, which no input exceeds.
std::vector<double> filled_boundaries(at::ArrayRef<double> boundaries, int64_t bits);

/// Checks the arguments of an op that finds the piece of each input.
void check_encoding(const char* op, const at::Tensor& input, at::ArrayRef<double> boundaries, int64_t bits);

/// Checks the arguments of an op that finds the inputs from `low` to `high`.
void check_band(const char* op, const at::Tensor& input, double low, double high);

/// Checks the arguments of an op that multiplies gradients by the levels of codes.
void check_step_backward(
    const char* op, const at::Tensor& grad_output, const at::Tensor& codes, at::ArrayRef<double> levels, int64_t bits);

/// Checks the arguments of an op that draws codes at random.
void check_drawing(
    const char* op, const at::Tensor& input, int64_t bits, const std::optional<at::Tensor>& seed, int64_t offset);

/// Checks the arguments of an op that multiplies gradients by the levels of codes drawn at random.
void check_drawn_backward(
    const char* op, const at::Tensor& grad_output, const at::Tensor& codes, const at::Tensor& seed, int64_t bits,
    int64_t offset);

void check_unpack(const char* op, const at::Tensor& packed, int64_t bits, const c10::SymInt& numel);

/// Checks the arguments of storage in groups.
GroupFormat check_group_encoding(
    const char* op, const at::Tensor& input, int64_t bits, const std::optional<at::Tensor>& seed, int64_t offset,
    int64_t group_size);

/// Checks the arguments of its inverse. Strides that are symbolic are not checked.
GroupFormat check_group_decoding(
    const char* op, const at::Tensor& codes, const at::Tensor& scales, c10::SymIntArrayRef size,
    at::OptionalSymIntArrayRef stride, at::ScalarType dtype, int64_t bits, const std::optional<at::Tensor>& seed,
    int64_t offset, int64_t group_size);

/// What a gated unit computes, and where its operands are.
struct GatedKind {
  GatedActivation activation;
  GatedLayout layout;
};

/// Checks the arguments of a gated unit. Without `up`, `gate` holds both operands.
GatedKind check_gated(
    const char* op, const at::Tensor& gate, const std::optional<at::Tensor>& up, std::string_view activation,
    std::string_view layout);

/// Sizes of each operand, and of the result.
c10::SymDimVector gated_sizes(const at::Tensor& gate, const std::optional<at::Tensor>& up);

/// Checks the arguments of a gated unit's backward.
GatedKind check_gated_backward(
    const char* op, const at::Tensor& grad_output, const at::Tensor& gate, const std::optional<at::Tensor>& up,
    std::string_view activation, std::string_view layout);

/// Checks the arguments of a gated unit and the linear layer behind it.
GatedKind check_gated_linear(
    const char* op, const at::Tensor& gate, const std::optional<at::Tensor>& up, const at::Tensor& weight,
    const std::optional<at::Tensor>& bias, std::string_view activation, std::string_view layout);

/// What dropout saves for the backward pass.
enum class DropoutSaves { mask, seed };

/// Checks the probability of an element to be dropped, and what is saved.
DropoutSaves check_dropout_options(const char* op, double p, std::string_view saves);

/// Checks the arguments of dropout.
void check_dropout(const char* op, const at::Tensor& input, double p);

/// Checks the arguments of dropout with a given mask.
void check_dropout_apply(const char* op, const at::Tensor& input, const at::Tensor& mask, double p);

/// Checks the arguments of dropout with a given seed.
void check_seeded_dropout_apply(const char* op, const at::Tensor& input, const at::Tensor& seed, double p);

/// Sizes derived from an input and its normalized_shape.
struct NormSizes {
  c10::SymInt rows = 1;
  c10::SymInt cols = 1;
  /// Sizes of rstd: the leading dimensions of the input, then ones (as in torch's native_layer_norm).
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

/// Number of rows from which the weight gradient of a linear layer is estimated: `dim` rows, or the fraction `ratio` of
/// all rows; then at least `min` and at most `max`.
struct ProjectionSize {
  std::optional<int64_t> dim;
  std::optional<double> ratio;
  std::optional<int64_t> min;
  std::optional<int64_t> max;
};

/// Raises if `size` does not determine how many rows are saved, or is invalid.
void check_projection_size(const char* op, const ProjectionSize& size);

/// Checks the arguments of a linear layer.
void check_linear(
    const char* op, const at::Tensor& input, const at::Tensor& weight, const std::optional<at::Tensor>& bias);

/// Checks a seed, if there is one. It must be on the device of `other`.
void check_seed(const char* op, const std::optional<at::Tensor>& seed, const char* other_name, const at::Tensor& other);

/// Checks the additional arguments of the forward of a linear layer that compresses its input.
void check_compression(
    const char* op, const at::Tensor& input, const std::optional<at::Tensor>& seed, const c10::SymInt& proj_dim);

/// Checks the arguments of the weight gradient of such a layer, and returns the number of rows of `grad_output`.
c10::SymInt check_weight_grad(
    const char* op, const at::Tensor& grad_output, const at::Tensor& compressed,
    const std::optional<at::Tensor>& indices, const at::Tensor& seed, bool picks_rows);

/// Checks the arguments of a low-rank adapter.
void check_lora(
    const char* op, const at::Tensor& input, const at::Tensor& lora_a, const at::Tensor& lora_b, double scaling,
    const std::optional<at::Tensor>& bias, double p, std::optional<at::ScalarType> dtype);

/// Checks the arguments of the gradient of its first weight.
void check_lora_weight_grad(
    const char* op, const at::Tensor& grad_product, const at::Tensor& input, const std::optional<at::Tensor>& mask,
    double p, at::ScalarType dtype);

/// Product of all sizes but the last.
c10::SymInt leading_rows(const at::Tensor& tensor);

/// dtype of rstd, and hence of a norm's statistics, for a given input dtype.
at::ScalarType rstd_dtype(at::ScalarType input_dtype);

/// F.rms_norm's default eps: machine epsilon of the type used for computing with the input.
double default_rms_norm_eps(at::ScalarType input_dtype);

inline bool has_tensor(const std::optional<at::Tensor>& tensor) {
  return tensor.has_value() && tensor->defined();
}

}  // namespace lomem::detail
