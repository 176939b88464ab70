#include "checks.h"

#include <c10/util/accumulate.h>
#include <lomem/core/packing.h>

#include <algorithm>
#include <cmath>
#include <limits>

namespace lomem::detail {
namespace {

constexpr const char* float_dtypes = "float64, float32, bfloat16 or float16";

/// Above this, the number of bits of the codes would overflow int64.
constexpr int64_t max_numel = std::numeric_limits<int64_t>::max() / 16;

bool is_supported_float(at::ScalarType dtype) {
  return dtype == at::kDouble || dtype == at::kFloat || dtype == at::kBFloat16 || dtype == at::kHalf;
}

auto dtype_name(at::ScalarType dtype) {
  return c10::getDtypeNames(dtype).first;
}

void check_float_dtype(const char* op, const char* argument, at::ScalarType dtype) {
  TORCH_CHECK(
      is_supported_float(dtype), op, ": ", argument, " has dtype ", dtype_name(dtype), ", expected ", float_dtypes);
}

void check_same_device(
    const char* op, const char* argument, const at::Tensor& tensor, const char* other_argument,
    const at::Tensor& other) {
  TORCH_CHECK(
      tensor.device() == other.device(), op, ": ", argument, " is on ", tensor.device(), ", expected ", other.device(),
      ", the device of ", other_argument);
}

void check_same_dtype(
    const char* op, const char* argument, const at::Tensor& tensor, const char* other_argument,
    const at::Tensor& other) {
  TORCH_CHECK(
      tensor.scalar_type() == other.scalar_type(), op, ": ", argument, " has dtype ", dtype_name(tensor.scalar_type()),
      ", expected ", dtype_name(other.scalar_type()), ", the dtype of ", other_argument);
}

void check_packed(
    const char* op, const char* argument, const at::Tensor& packed, const c10::SymInt& numel, int64_t bits) {
  check_byte_tensor(op, argument, packed);
  const c10::SymInt expected = packed_bytes(numel, static_cast<int>(bits));
  TORCH_CHECK(
      packed.sym_numel() == expected, op, ": ", argument, " has ", packed.sym_numel(), " bytes, expected ", expected,
      " for ", numel, " elements of ", bits, " bits");
}

void check_norm_parameter(
    const char* op, const char* argument, const std::optional<at::Tensor>& parameter,
    c10::SymIntArrayRef normalized_shape, const char* other_argument, const at::Tensor& other) {
  if (!has_tensor(parameter)) {
    return;
  }
  check_float_tensor(op, argument, *parameter);
  check_same_device(op, argument, *parameter, other_argument, other);
  TORCH_CHECK(
      parameter->sym_sizes() == normalized_shape, op, ": ", argument, " has shape ", parameter->sym_sizes(),
      ", expected normalized_shape ", normalized_shape);
}

/// The value of a condition on sizes, or `otherwise` if they are symbolic. Adds no guard on them.
bool known_or(const c10::SymBool& condition, bool otherwise) {
  return condition.maybe_as_bool().value_or(otherwise);
}

NormSizes norm_sizes(
    const char* op, const char* argument, const at::Tensor& tensor, c10::SymIntArrayRef normalized_shape) {
  const auto sizes = tensor.sym_sizes();
  TORCH_CHECK_VALUE(!normalized_shape.empty(), op, ": normalized_shape is empty, expected at least one dimension");
  const bool matches = sizes.size() >= normalized_shape.size() &&
                       sizes.slice(sizes.size() - normalized_shape.size()) == normalized_shape;
  TORCH_CHECK(
      matches, op, ": ", argument, " has shape ", sizes, ", expected one that ends with normalized_shape ",
      normalized_shape);
  NormSizes result;
  const size_t leading = sizes.size() - normalized_shape.size();
  for (size_t i = 0; i < sizes.size(); ++i) {
    (i < leading ? result.rows : result.cols) *= sizes[i];
    result.rstd.push_back(i < leading ? sizes[i] : c10::SymInt(1));
  }
  return result;
}

}  // namespace

DType to_dtype(at::ScalarType dtype) {
  switch (dtype) {
    case at::kDouble: return DType::float64;
    case at::kFloat: return DType::float32;
    case at::kBFloat16: return DType::bfloat16;
    case at::kHalf: return DType::float16;
    default: TORCH_INTERNAL_ASSERT(false, "unchecked dtype ", dtype_name(dtype));
  }
}

void check_strided(const char* op, const char* argument, const at::Tensor& tensor) {
  TORCH_CHECK(tensor.defined(), op, ": ", argument, " is undefined, expected a tensor");
  TORCH_CHECK(!tensor.is_nested(), op, ": ", argument, " is a nested tensor, expected a dense one");
  TORCH_CHECK(
      tensor.layout() == at::kStrided, op, ": ", argument, " has layout ", tensor.layout(),
      ", expected a dense (torch.strided) tensor");
  // (Adds no guard on symbolic sizes.)
  const std::optional<int64_t> numel = tensor.sym_numel().maybe_as_int();
  TORCH_CHECK_VALUE(
      !numel || *numel <= max_numel, op, ": ", argument, " has ", *numel, " elements, expected at most ", max_numel);
}

void check_float_tensor(const char* op, const char* argument, const at::Tensor& tensor) {
  check_strided(op, argument, tensor);
  check_float_dtype(op, argument, tensor.scalar_type());
}

void check_byte_tensor(const char* op, const char* argument, const at::Tensor& tensor) {
  check_strided(op, argument, tensor);
  TORCH_CHECK(
      tensor.scalar_type() == at::kByte, op, ": ", argument, " has dtype ", dtype_name(tensor.scalar_type()),
      ", expected uint8");
}

void check_bits(const char* op, int64_t bits) {
  TORCH_CHECK_VALUE(
      min_bits <= bits && bits <= max_bits, op, ": bits is ", bits, ", expected ", min_bits, " to ", max_bits);
}

void check_boundaries(const char* op, at::ArrayRef<double> boundaries, int64_t bits) {
  check_bits(op, bits);
  const size_t most = (size_t{1} << bits) - 1;
  TORCH_CHECK_VALUE(
      boundaries.size() <= most, op, ": boundaries has ", boundaries.size(), " entries, expected at most ", most,
      " for ", bits, " bits");
  for (size_t i = 0; i < boundaries.size(); ++i) {
    TORCH_CHECK_VALUE(
        !std::isnan(boundaries[i]), op, ": boundaries has a NaN at index ", i, ", expected ascending numbers");
    TORCH_CHECK_VALUE(
        i == 0 || boundaries[i - 1] <= boundaries[i], op, ": boundaries has ", boundaries[i - 1], " before ",
        boundaries[i], " at index ", i, ", expected ascending numbers");
  }
}

std::vector<double> filled_boundaries(at::ArrayRef<double> boundaries, int64_t bits) {
  std::vector<double> filled = boundaries.vec();
  filled.resize((size_t{1} << bits) - 1, std::numeric_limits<double>::infinity());
  return filled;
}

void check_encoding(const char* op, const at::Tensor& input, at::ArrayRef<double> boundaries, int64_t bits) {
  check_float_tensor(op, "input", input);
  check_boundaries(op, boundaries, bits);
}

void check_band(const char* op, const at::Tensor& input, double low, double high) {
  check_float_tensor(op, "input", input);
  TORCH_CHECK_VALUE(!std::isnan(low), op, ": low is NaN, expected a number");
  TORCH_CHECK_VALUE(!std::isnan(high), op, ": high is NaN, expected a number");
}

void check_step_backward(
    const char* op, const at::Tensor& grad_output, const at::Tensor& codes, at::ArrayRef<double> levels, int64_t bits) {
  check_bits(op, bits);
  TORCH_CHECK_VALUE(
      levels.size() == size_t{1} << bits, op, ": levels has ", levels.size(), " entries, expected ", size_t{1} << bits,
      " for ", bits, " bits");
  check_float_tensor(op, "grad_output", grad_output);
  check_packed(op, "codes", codes, grad_output.sym_numel(), bits);
  check_same_device(op, "codes", codes, "grad_output", grad_output);
}

namespace {

/// A stream of random bits.
void check_stream(
    const char* op, const std::optional<at::Tensor>& seed, int64_t offset, const char* name, const at::Tensor& tensor) {
  check_seed(op, seed, name, tensor);
  TORCH_CHECK_VALUE(offset >= 0, op, ": offset is ", offset, ", expected at least 0");
}

}  // namespace

void check_drawing(
    const char* op, const at::Tensor& input, int64_t bits, const std::optional<at::Tensor>& seed, int64_t offset) {
  check_bits(op, bits);
  check_float_tensor(op, "input", input);
  check_stream(op, seed, offset, "input", input);
}

void check_drawn_backward(
    const char* op, const at::Tensor& grad_output, const at::Tensor& codes, const at::Tensor& seed, int64_t bits,
    int64_t offset) {
  check_bits(op, bits);
  check_float_tensor(op, "grad_output", grad_output);
  check_packed(op, "codes", codes, grad_output.sym_numel(), bits);
  check_same_device(op, "codes", codes, "grad_output", grad_output);
  check_stream(op, seed, offset, "grad_output", grad_output);
}

void check_unpack(const char* op, const at::Tensor& packed, int64_t bits, const c10::SymInt& numel) {
  check_bits(op, bits);
  TORCH_CHECK_VALUE(numel >= 0 && numel <= max_numel, op, ": numel is ", numel, ", expected 0 to ", max_numel);
  check_packed(op, "packed", packed, numel, bits);
}

namespace {

GroupFormat check_group_format(const char* op, int64_t bits, int64_t group_size) {
  TORCH_CHECK_VALUE(bits == 8 || bits == 4, op, ": bits is ", bits, ", expected 8 or 4");
  TORCH_CHECK_VALUE(
      is_scale_group(group_size), op, ": group_size is ", group_size, ", expected a power of two from ",
      min_scale_group, " to ", max_scale_group);
  return {static_cast<int>(bits), static_cast<int>(group_size)};
}

/// The numbers, if none of them is symbolic.
std::optional<std::vector<int64_t>> known(c10::SymIntArrayRef numbers) {
  std::vector<int64_t> result;
  for (const c10::SymInt& number : numbers) {
    const std::optional<int64_t> value = number.maybe_as_int();
    if (!value) {
      return std::nullopt;
    }
    result.push_back(*value);
  }
  return result;
}

/// The number of elements of a tensor to be made.
c10::SymInt check_size(const char* op, c10::SymIntArrayRef size) {
  for (const c10::SymInt& length : size) {
    TORCH_CHECK_VALUE(known_or(length.sym_ge(0), true), op, ": size is ", size, ", expected no negative number");
  }
  if (const auto lengths = known(size)) {
    // (Without zeros: torch computes strides of the other sizes.)
    int64_t product = 1;
    for (const int64_t length : *lengths) {
      TORCH_CHECK_VALUE(
          !__builtin_mul_overflow(product, std::max<int64_t>(length, 1), &product) && product <= max_numel, op,
          ": size is ", size, ", expected at most ", max_numel, " elements");
    }
  }
  return c10::multiply_integers(size);
}

/// Strides must be those of a tensor whose elements fill a range of memory, each at one place.
void check_dense(const char* op, c10::SymIntArrayRef size, c10::SymIntArrayRef stride) {
  TORCH_CHECK_VALUE(
      stride.size() == size.size(), op, ": stride is ", stride, ", expected ", size.size(), " numbers, as size has");
  for (const c10::SymInt& step : stride) {
    TORCH_CHECK_VALUE(known_or(step.sym_ge(0), true), op, ": stride is ", stride, ", expected no negative number");
  }
  const auto sizes = known(size);
  const auto strides = known(stride);
  if (!sizes || !strides || std::find(sizes->begin(), sizes->end(), 0) != sizes->end()) {
    return;
  }
  std::vector<size_t> order;
  for (size_t i = 0; i < sizes->size(); ++i) {
    if ((*sizes)[i] > 1) {
      order.push_back(i);
    }
  }
  std::sort(order.begin(), order.end(), [&](size_t a, size_t b) { return (*strides)[a] < (*strides)[b]; });
  int64_t next = 1;
  for (const size_t i : order) {
    TORCH_CHECK_VALUE(
        (*strides)[i] == next, op, ": stride is ", stride, ", expected that of a dense tensor of size ", size);
    next *= (*sizes)[i];
  }
}

}  // namespace

GroupFormat check_group_encoding(
    const char* op, const at::Tensor& input, int64_t bits, const std::optional<at::Tensor>& seed, int64_t offset,
    int64_t group_size) {
  check_float_tensor(op, "input", input);
  check_stream(op, seed, offset, "input", input);
  return check_group_format(op, bits, group_size);
}

GroupFormat check_group_decoding(
    const char* op, const at::Tensor& codes, const at::Tensor& scales, c10::SymIntArrayRef size,
    at::OptionalSymIntArrayRef stride, at::ScalarType dtype, int64_t bits, const std::optional<at::Tensor>& seed,
    int64_t offset, int64_t group_size) {
  check_byte_tensor(op, "codes", codes);
  check_strided(op, "scales", scales);
  TORCH_CHECK(
      scales.scalar_type() == at::kBFloat16, op, ": scales has dtype ", dtype_name(scales.scalar_type()),
      ", expected bfloat16");
  check_same_device(op, "scales", scales, "codes", codes);
  check_stream(op, seed, offset, "codes", codes);
  const GroupFormat format = check_group_format(op, bits, group_size);
  TORCH_CHECK(is_supported_float(dtype), op, ": dtype is ", dtype_name(dtype), ", expected ", float_dtypes);
  const c10::SymInt numel = check_size(op, size);
  if (stride.has_value()) {
    check_dense(op, size, *stride);
  }
  check_packed(op, "codes", codes, numel, bits);
  const c10::SymInt expected = scale_count(numel, format.group);
  TORCH_CHECK(
      scales.sym_numel() == expected, op, ": scales has ", scales.sym_numel(), " elements, expected ", expected,
      " for ", numel, " elements in groups of ", group_size);
  return format;
}

namespace {

/// Checks how the tensors of a gated unit fit together, each of which is a float tensor.
GatedKind check_operands(
    const char* op, const at::Tensor& gate, const std::optional<at::Tensor>& up, std::string_view activation,
    std::string_view layout) {
  const std::optional<GatedActivation> known_activation = gated_activation(activation);
  TORCH_CHECK_VALUE(
      known_activation, op, ": activation is '", activation, "', expected one of silu, gelu, gelu_tanh, relu, sigmoid");
  const std::optional<GatedLayout> known_layout = gated_layout(layout);
  TORCH_CHECK_VALUE(known_layout, op, ": layout is '", layout, "', expected one of gate_up, up_gate, interleaved");
  if (has_tensor(up)) {
    check_same_device(op, "up", *up, "gate", gate);
    check_same_dtype(op, "up", *up, "gate", gate);
    TORCH_CHECK(
        up->sym_sizes() == gate.sym_sizes(), op, ": up has shape ", up->sym_sizes(), ", expected ", gate.sym_sizes(),
        ", the shape of gate");
  } else {
    TORCH_CHECK(
        gate.dim() >= 1 && known_or((gate.sym_size(-1) % 2).sym_eq(0), true), op, ": gate has shape ", gate.sym_sizes(),
        ", expected an even last dimension, which holds gate and up");
  }
  return {*known_activation, *known_layout};
}

void check_optional_float_tensor(const char* op, const char* argument, const std::optional<at::Tensor>& tensor) {
  if (has_tensor(tensor)) {
    check_float_tensor(op, argument, *tensor);
  }
}

}  // namespace

GatedKind check_gated(
    const char* op, const at::Tensor& gate, const std::optional<at::Tensor>& up, std::string_view activation,
    std::string_view layout) {
  check_float_tensor(op, "gate", gate);
  check_optional_float_tensor(op, "up", up);
  return check_operands(op, gate, up, activation, layout);
}

c10::SymDimVector gated_sizes(const at::Tensor& gate, const std::optional<at::Tensor>& up) {
  c10::SymDimVector sizes(gate.sym_sizes().begin(), gate.sym_sizes().end());
  if (!has_tensor(up)) {
    sizes.back() = sizes.back() / 2;
  }
  return sizes;
}

GatedKind check_gated_backward(
    const char* op, const at::Tensor& grad_output, const at::Tensor& gate, const std::optional<at::Tensor>& up,
    std::string_view activation, std::string_view layout) {
  check_float_tensor(op, "grad_output", grad_output);
  const GatedKind kind = check_gated(op, gate, up, activation, layout);
  check_same_device(op, "grad_output", grad_output, "gate", gate);
  check_same_dtype(op, "grad_output", grad_output, "gate", gate);
  const c10::SymDimVector sizes = gated_sizes(gate, up);
  TORCH_CHECK(
      grad_output.sym_sizes() == c10::SymIntArrayRef(sizes), op, ": grad_output has shape ", grad_output.sym_sizes(),
      ", expected ", c10::SymIntArrayRef(sizes), ", the shape of the unit's result");
  return kind;
}

GatedKind check_gated_linear(
    const char* op, const at::Tensor& gate, const std::optional<at::Tensor>& up, const at::Tensor& weight,
    const std::optional<at::Tensor>& bias, std::string_view activation, std::string_view layout) {
  check_float_tensor(op, "gate", gate);
  check_optional_float_tensor(op, "up", up);
  check_float_tensor(op, "weight", weight);
  check_optional_float_tensor(op, "bias", bias);
  const GatedKind kind = check_operands(op, gate, up, activation, layout);
  TORCH_CHECK(gate.dim() >= 1, op, ": gate has shape ", gate.sym_sizes(), ", expected at least one dimension");
  check_same_device(op, "weight", weight, "gate", gate);
  TORCH_CHECK(
      weight.dim() == 2, op, ": weight has shape ", weight.sym_sizes(), ", expected (out_features, in_features)");
  const c10::SymInt in_features = gated_sizes(gate, up).back();
  TORCH_CHECK(
      weight.sym_size(1) == in_features, op, ": weight has shape ", weight.sym_sizes(), ", expected in_features ",
      in_features, ", the last dimension of the unit's result");
  if (has_tensor(bias)) {
    check_same_device(op, "bias", *bias, "gate", gate);
    check_same_dtype(op, "bias", *bias, "weight", weight);
    TORCH_CHECK(
        bias->dim() == 1 && bias->sym_size(0) == weight.sym_size(0), op, ": bias has shape ", bias->sym_sizes(),
        ", expected [", weight.sym_size(0), "], the out_features of weight");
  }
  return kind;
}

DropoutSaves check_dropout_options(const char* op, double p, std::string_view saves) {
  TORCH_CHECK_VALUE(0 <= p && p < 1, op, ": p is ", p, ", expected a number in [0, 1)");
  TORCH_CHECK_VALUE(saves == "mask" || saves == "seed", op, ": saves is '", saves, "', expected 'mask' or 'seed'");
  return saves == "mask" ? DropoutSaves::mask : DropoutSaves::seed;
}

void check_dropout(const char* op, const at::Tensor& input, double p) {
  check_float_tensor(op, "input", input);
  check_dropout_options(op, p, "mask");
}

void check_dropout_apply(const char* op, const at::Tensor& input, const at::Tensor& mask, double p) {
  check_dropout(op, input, p);
  check_packed(op, "mask", mask, input.sym_numel(), 1);
  check_same_device(op, "mask", mask, "input", input);
}

void check_seeded_dropout_apply(const char* op, const at::Tensor& input, const at::Tensor& seed, double p) {
  check_dropout(op, input, p);
  TORCH_CHECK(seed.defined(), op, ": seed is undefined, expected a tensor");
  check_seed(op, seed, "input", input);
}

NormSizes check_norm_forward(
    const char* op, const at::Tensor& input, c10::SymIntArrayRef normalized_shape,
    const std::optional<at::Tensor>& weight, const std::optional<at::Tensor>& bias, std::optional<double> eps,
    std::optional<at::ScalarType> dtype) {
  check_float_tensor(op, "input", input);
  NormSizes sizes = norm_sizes(op, "input", input, normalized_shape);
  check_norm_parameter(op, "weight", weight, normalized_shape, "input", input);
  check_norm_parameter(op, "bias", bias, normalized_shape, "input", input);
  TORCH_CHECK_VALUE(
      !eps || (std::isfinite(*eps) && *eps >= 0), op, ": eps is ", *eps, ", expected a finite number >= 0");
  TORCH_CHECK(!dtype || is_supported_float(*dtype), op, ": dtype is ", dtype_name(*dtype), ", expected ", float_dtypes);
  return sizes;
}

NormSizes check_norm_backward(
    const char* op, const at::Tensor& grad_output, const at::Tensor& output, const at::Tensor& rstd,
    c10::SymIntArrayRef normalized_shape, const std::optional<at::Tensor>& weight,
    const std::optional<at::Tensor>& bias, at::ScalarType input_dtype) {
  check_float_tensor(op, "output", output);
  NormSizes sizes = norm_sizes(op, "output", output, normalized_shape);
  check_float_tensor(op, "grad_output", grad_output);
  check_same_device(op, "grad_output", grad_output, "output", output);
  TORCH_CHECK(
      grad_output.sym_sizes() == output.sym_sizes(), op, ": grad_output has shape ", grad_output.sym_sizes(),
      ", expected ", output.sym_sizes(), ", the shape of output");
  TORCH_CHECK(
      is_supported_float(input_dtype), op, ": input_dtype is ", dtype_name(input_dtype), ", expected ", float_dtypes);
  check_strided(op, "rstd", rstd);
  check_same_device(op, "rstd", rstd, "output", output);
  TORCH_CHECK(
      rstd.scalar_type() == rstd_dtype(input_dtype), op, ": rstd has dtype ", dtype_name(rstd.scalar_type()),
      ", expected ", dtype_name(rstd_dtype(input_dtype)), " for input_dtype ", dtype_name(input_dtype));
  TORCH_CHECK(
      rstd.sym_numel() == sizes.rows, op, ": rstd has ", rstd.sym_numel(), " elements, expected ", sizes.rows,
      ", one per row");
  check_norm_parameter(op, "weight", weight, normalized_shape, "output", output);
  check_norm_parameter(op, "bias", bias, normalized_shape, "output", output);
  return sizes;
}

void check_projection_size(const char* op, const ProjectionSize& size) {
  TORCH_CHECK_VALUE(
      size.dim.has_value() != size.ratio.has_value(), op, ": proj_dim and proj_dim_ratio are ",
      size.dim ? "both given" : "both missing", ", expected one of them");
  TORCH_CHECK_VALUE(!size.dim || *size.dim >= 1, op, ": proj_dim is ", *size.dim, ", expected at least 1");
  TORCH_CHECK_VALUE(
      !size.ratio || (0 < *size.ratio && *size.ratio <= 1), op, ": proj_dim_ratio is ", *size.ratio,
      ", expected a number in (0, 1]");
  TORCH_CHECK_VALUE(!size.min || *size.min >= 1, op, ": proj_dim_min is ", *size.min, ", expected at least 1");
  TORCH_CHECK_VALUE(!size.max || *size.max >= 1, op, ": proj_dim_max is ", *size.max, ", expected at least 1");
  TORCH_CHECK_VALUE(
      !size.min || !size.max || *size.min <= *size.max, op, ": proj_dim_min is ", *size.min,
      ", expected at most proj_dim_max, ", *size.max);
}

void check_linear(
    const char* op, const at::Tensor& input, const at::Tensor& weight, const std::optional<at::Tensor>& bias) {
  check_float_tensor(op, "input", input);
  check_float_tensor(op, "weight", weight);
  const auto check_like_input = [&](const char* argument, const at::Tensor& tensor) {
    check_same_device(op, argument, tensor, "input", input);
    TORCH_CHECK(
        tensor.scalar_type() == input.scalar_type(), op, ": ", argument, " has dtype ",
        dtype_name(tensor.scalar_type()), ", expected ", dtype_name(input.scalar_type()), ", the dtype of input");
  };
  check_like_input("weight", weight);
  TORCH_CHECK(
      weight.dim() == 2, op, ": weight has shape ", weight.sym_sizes(), ", expected (out_features, in_features)");
  const c10::SymInt& in_features = weight.sym_size(1);
  TORCH_CHECK(
      input.dim() >= 1 && input.sym_size(-1) == in_features, op, ": input has shape ", input.sym_sizes(),
      ", expected a last dimension of ", in_features, ", the in_features of weight");
  if (has_tensor(bias)) {
    check_float_tensor(op, "bias", *bias);
    check_like_input("bias", *bias);
    TORCH_CHECK(
        bias->dim() == 1 && bias->sym_size(0) == weight.sym_size(0), op, ": bias has shape ", bias->sym_sizes(),
        ", expected [", weight.sym_size(0), "], the out_features of weight");
  }
}

void check_lora(
    const char* op, const at::Tensor& input, const at::Tensor& lora_a, const at::Tensor& lora_b, double scaling,
    const std::optional<at::Tensor>& bias, double p, std::optional<at::ScalarType> dtype) {
  check_float_tensor(op, "input", input);
  check_float_tensor(op, "lora_a", lora_a);
  check_float_tensor(op, "lora_b", lora_b);
  check_optional_float_tensor(op, "bias", bias);
  check_same_device(op, "lora_a", lora_a, "input", input);
  TORCH_CHECK(lora_a.dim() == 2, op, ": lora_a has shape ", lora_a.sym_sizes(), ", expected (rank, in_features)");
  TORCH_CHECK(
      input.dim() >= 1 && input.sym_size(-1) == lora_a.sym_size(1), op, ": input has shape ", input.sym_sizes(),
      ", expected a last dimension of ", lora_a.sym_size(1), ", the in_features of lora_a");
  check_same_device(op, "lora_b", lora_b, "input", input);
  check_same_dtype(op, "lora_b", lora_b, "lora_a", lora_a);
  TORCH_CHECK(lora_b.dim() == 2, op, ": lora_b has shape ", lora_b.sym_sizes(), ", expected (out_features, rank)");
  TORCH_CHECK(
      lora_b.sym_size(1) == lora_a.sym_size(0), op, ": lora_b has shape ", lora_b.sym_sizes(), ", expected rank ",
      lora_a.sym_size(0), ", that of lora_a");
  if (has_tensor(bias)) {
    check_same_device(op, "bias", *bias, "input", input);
    check_same_dtype(op, "bias", *bias, "lora_a", lora_a);
    TORCH_CHECK(
        bias->dim() == 1 && bias->sym_size(0) == lora_b.sym_size(0), op, ": bias has shape ", bias->sym_sizes(),
        ", expected [", lora_b.sym_size(0), "], the out_features of lora_b");
  }
  TORCH_CHECK_VALUE(std::isfinite(scaling), op, ": scaling is ", scaling, ", expected a finite number");
  check_dropout_options(op, p, "mask");
  TORCH_CHECK(!dtype || is_supported_float(*dtype), op, ": dtype is ", dtype_name(*dtype), ", expected ", float_dtypes);
}

void check_lora_weight_grad(
    const char* op, const at::Tensor& grad_product, const at::Tensor& input, const std::optional<at::Tensor>& mask,
    double p, at::ScalarType dtype) {
  check_float_tensor(op, "grad_product", grad_product);
  TORCH_CHECK(grad_product.dim() >= 1, op, ": grad_product has no dimensions, expected at least 1");
  check_dropout(op, input, p);
  check_same_device(op, "input", input, "grad_product", grad_product);
  const c10::SymInt rows = leading_rows(grad_product);
  TORCH_CHECK(
      input.dim() >= 1 && known_or(leading_rows(input).sym_eq(rows), true), op, ": input has shape ", input.sym_sizes(),
      ", expected ", rows, " rows, as grad_product has");
  if (has_tensor(mask)) {
    check_dropout_apply(op, input, *mask, p);
  }
  TORCH_CHECK(is_supported_float(dtype), op, ": dtype is ", dtype_name(dtype), ", expected ", float_dtypes);
}

c10::SymInt leading_rows(const at::Tensor& tensor) {
  c10::SymInt rows = 1;
  for (const auto& size : tensor.sym_sizes().slice(0, tensor.dim() - 1)) {
    rows *= size;
  }
  return rows;
}

void check_seed(
    const char* op, const std::optional<at::Tensor>& seed, const char* other_name, const at::Tensor& other) {
  if (!has_tensor(seed)) {
    return;
  }
  check_strided(op, "seed", *seed);
  check_same_device(op, "seed", *seed, other_name, other);
  TORCH_CHECK(
      seed->scalar_type() == at::kLong && seed->dim() == 0, op, ": seed is of dtype ", dtype_name(seed->scalar_type()),
      " and shape ", seed->sym_sizes(), ", expected int64 and []");
}

void check_compression(
    const char* op, const at::Tensor& input, const std::optional<at::Tensor>& seed, const c10::SymInt& proj_dim) {
  check_seed(op, seed, "input", input);
  TORCH_CHECK_VALUE(known_or(proj_dim.sym_ge(1), true), op, ": proj_dim is ", proj_dim, ", expected at least 1");
}

c10::SymInt check_weight_grad(
    const char* op, const at::Tensor& grad_output, const at::Tensor& compressed,
    const std::optional<at::Tensor>& indices, const at::Tensor& seed, bool picks_rows) {
  check_float_tensor(op, "grad_output", grad_output);
  TORCH_CHECK(grad_output.dim() >= 1, op, ": grad_output has no dimensions, expected at least 1");
  check_float_tensor(op, "compressed", compressed);
  check_same_device(op, "compressed", compressed, "grad_output", grad_output);
  TORCH_CHECK(
      compressed.scalar_type() == grad_output.scalar_type(), op, ": compressed has dtype ",
      dtype_name(compressed.scalar_type()), ", expected ", dtype_name(grad_output.scalar_type()),
      ", the dtype of grad_output");
  const c10::SymInt rows = leading_rows(grad_output);
  TORCH_CHECK(
      compressed.dim() == 2, op, ": compressed has shape ", compressed.sym_sizes(),
      ", expected (proj_dim, in_features)");
  const c10::SymInt& proj_dim = compressed.sym_size(0);
  TORCH_CHECK(
      known_or(proj_dim.sym_le(rows), true) && (known_or(proj_dim.sym_ge(1), true) || known_or(rows.sym_eq(0), true)),
      op, ": compressed has ", proj_dim, " rows, expected 1 to ", rows, ", the number of rows of grad_output");
  if (picks_rows) {
    TORCH_CHECK(has_tensor(indices), op, ": indices is missing, expected the indices of the rows of compressed");
    check_strided(op, "indices", *indices);
    check_same_device(op, "indices", *indices, "grad_output", grad_output);
    TORCH_CHECK(
        indices->scalar_type() == at::kLong, op, ": indices has dtype ", dtype_name(indices->scalar_type()),
        ", expected int64");
    TORCH_CHECK(
        indices->dim() == 1 && known_or(indices->sym_size(0).sym_eq(proj_dim), true), op, ": indices has shape ",
        indices->sym_sizes(), ", expected [", proj_dim, "]");
  }
  check_seed(op, seed, "grad_output", grad_output);
  return rows;
}

at::ScalarType rstd_dtype(at::ScalarType input_dtype) {
  return input_dtype == at::kDouble ? at::kDouble : at::kFloat;
}

double default_rms_norm_eps(at::ScalarType input_dtype) {
  return input_dtype == at::kDouble ? std::numeric_limits<double>::epsilon()
                                    : static_cast<double>(std::numeric_limits<float>::epsilon());
}

}  // namespace lomem::detail
