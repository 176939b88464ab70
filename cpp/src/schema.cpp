// Every op of the library, in one place.
//
// A differentiable op is a triple:
//   X            public; keeps nothing where no gradient is needed
//   X_forward    X's result and what its backward pass needs
//   X_backward   gradients from grad_output and what X_forward returned. The step activations
//                share one, step_activation_backward.
//                randomized_linear's is of the weight alone, randomized_linear_weight_grad.
// All ops are functional. What differs between backends stands in cpu/ and meta/; what does not
// (autograd, autocast) in folders of its own, with the same file names in each.
#include <torch/library.h>

TORCH_LIBRARY(lomem, m) {
  // needs_exact_strides: codes follow the memory order of the forward's output, so a compiler
  // must hand the ops the strides that it traced them with.
  const std::vector<at::Tag> functional = {at::Tag::pt2_compliant_tag};
  const std::vector<at::Tag> strided = {at::Tag::pt2_compliant_tag, at::Tag::needs_exact_strides};

  // Step activations. `codes`: 1-D uint8, 2 bits an element in the memory order of `output`.
  // `fast`: a backend may return the values of core/fast_forward.h in place of torch's.
  m.def("regelu2(Tensor input, *, str approximate=\"none\", bool fast=False) -> Tensor", strided);
  m.def(
      "regelu2_forward(Tensor input, *, str approximate=\"none\", bool fast=False) -> (Tensor output, Tensor codes)",
      strided);
  m.def("resilu2(Tensor input, *, bool fast=False) -> Tensor", strided);
  m.def("resilu2_forward(Tensor input, *, bool fast=False) -> (Tensor output, Tensor codes)", strided);

  // The family: activations by name, with their parameters. `boundaries` and `levels`: a step function of the caller's,
  // in place of the library's. `codes`: `bits` bits an element, in the memory order of `output`.
  m.def(
      "step_activation(Tensor input, str function, float[] parameters, int bits, *, str criterion=\"derivative\", "
      "float[]? boundaries=None, float[]? levels=None) -> Tensor",
      strided);
  m.def(
      "step_activation_forward(Tensor input, str function, float[] parameters, int bits, *, "
      "str criterion=\"derivative\", float[]? boundaries=None, float[]? levels=None) -> (Tensor output, Tensor codes)",
      strided);
  // Activations of straight pieces: one bit, exact.
  m.def("hard_activation(Tensor input, str function, float[] parameters) -> Tensor", strided);
  m.def(
      "hard_activation_forward(Tensor input, str function, float[] parameters) -> (Tensor output, Tensor codes)",
      strided);

  // Codes in the row-major order of input: how many boundaries are below, and whether low <= input <= high (one bit).
  // Not differentiable.
  m.def("step_codes(Tensor input, float[] boundaries, int bits) -> Tensor", functional);
  m.def("band_codes(Tensor input, float low, float high) -> Tensor", functional);

  // The backward of every step activation. Here codes follow the row-major order of grad_output,
  // whatever its strides: the autograd layer permutes it to the memory order of the forward.
  m.def("step_activation_backward(Tensor grad_output, Tensor codes, float[] levels, int bits) -> Tensor", functional);

  // Norms. `dtype`: dtype of the output; by default the autocast dtype where autocast is on and
  // else the input's. `rstd`: float32 (float64 for a float64 input), one element a row.
  m.def(
      "ms_layer_norm(Tensor input, SymInt[] normalized_shape, Tensor? weight=None, Tensor? bias=None, "
      "float eps=1e-05, *, ScalarType? dtype=None) -> Tensor",
      functional);
  m.def(
      "ms_layer_norm_forward(Tensor input, SymInt[] normalized_shape, Tensor? weight=None, Tensor? bias=None, "
      "float eps=1e-05, *, ScalarType? dtype=None) -> (Tensor output, Tensor rstd)",
      functional);
  m.def(
      "ms_layer_norm_backward(Tensor grad_output, Tensor output, Tensor rstd, SymInt[] normalized_shape, "
      "Tensor? weight, Tensor? bias, ScalarType input_dtype, bool[3] output_mask) -> "
      "(Tensor grad_input, Tensor grad_weight, Tensor grad_bias)",
      functional);
  m.def(
      "ms_rms_norm(Tensor input, SymInt[] normalized_shape, Tensor? weight=None, float? eps=None, *, "
      "ScalarType? dtype=None) -> Tensor",
      functional);
  m.def(
      "ms_rms_norm_forward(Tensor input, SymInt[] normalized_shape, Tensor? weight=None, float? eps=None, *, "
      "ScalarType? dtype=None) -> (Tensor output, Tensor rstd)",
      functional);
  m.def(
      "ms_rms_norm_backward(Tensor grad_output, Tensor output, Tensor rstd, SymInt[] normalized_shape, "
      "Tensor? weight, ScalarType input_dtype, bool[2] output_mask) -> (Tensor grad_input, Tensor grad_weight)",
      functional);

  // Linear layer whose weight gradient is estimated from `compressed`, `proj_dim` random combinations (or picks:
  // `indices`) of the rows of its input. `seed`: 0-d int64, on the device of the input, never read on the host; what is
  // random follows from it. Without one the forward op draws one, of lomem's own stream. It returns the seed that it
  // used beside what it made with it: whoever runs it again, or keeps what it returned, has both or neither. The other
  // gradients are torch's own ops.
  const std::vector<at::Tag> random = {at::Tag::pt2_compliant_tag, at::Tag::nondeterministic_seeded};
  m.def(
      "randomized_linear(Tensor input, Tensor weight, Tensor? bias=None, *, str matmul=\"gaussian\", "
      "int? proj_dim=None, float? proj_dim_ratio=None, int? proj_dim_min=None, int? proj_dim_max=None, "
      "Tensor? seed=None) -> Tensor",
      random);
  m.def(
      "randomized_linear_forward(Tensor input, Tensor weight, Tensor? bias, Tensor? seed, SymInt proj_dim, *, "
      "str matmul=\"gaussian\") -> (Tensor output, Tensor compressed, Tensor indices, Tensor used_seed)",
      random);
  m.def(
      "randomized_linear_weight_grad(Tensor grad_output, Tensor compressed, Tensor? indices, Tensor seed, *, "
      "str matmul=\"gaussian\") -> Tensor",
      functional);

  // Packing of codes of 1 to 8 bits. Not differentiable.
  m.def("pack_bits(Tensor codes, int bits) -> Tensor", functional);
  m.def("unpack_bits(Tensor packed, int bits, SymInt numel) -> Tensor", functional);
}
