#include "random_projection.h"

#include <ATen/Functions.h>
#include <ATen/TensorOperators.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <numbers>

#include "random_numbers.h"

namespace lomem::detail {
namespace {

/// Number of elements of S generated at a time in float32 (float64): together with their random bits at most 64 MiB, or
/// one row.
constexpr int64_t matrix_block = int64_t{1} << 23;
/// Number of elements in a block of columns transformed at a time: together with their spectrum at most 64 MiB in
/// float32 (twice that in float64), or one column.
constexpr int64_t transform_block = int64_t{1} << 21;

/// The dtype in which random numbers are drawn and transforms are computed.
at::ScalarType compute_dtype(const at::Tensor& rows) {
  return rows.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
}

/// S with independent elements of variance 1 / proj_dim.
at::Tensor project_dense(RandomMatmul matmul, const at::Tensor& rows, int64_t proj_dim, const at::Tensor& seed) {
  RandomNumbers random(seed);
  const at::TensorOptions options = rows.options().dtype(compute_dtype(rows));
  const int64_t height = std::max<int64_t>(1, matrix_block / rows.size(0));
  at::Tensor result = at::empty({proj_dim, rows.size(1)}, rows.options());
  for (int64_t first = 0; first < proj_dim; first += height) {
    const int64_t count = std::min(height, proj_dim - first);
    const std::array<int64_t, 2> sizes = {count, rows.size(0)};
    // 16-bit rows are multiplied by 16-bit numbers and summed in float32: casting the rows instead would take twice
    // their memory. Gaussian numbers rounded to bfloat16 have a variance of 1 + 1e-6, and signs are exact; the factor
    // would not be, so it is applied to the sums.
    const at::Tensor numbers =
        matmul == RandomMatmul::gaussian ? random.normal(sizes, options) : random.signs(sizes, options);
    const at::Tensor matrix = numbers.to(rows.scalar_type());
    at::Tensor block = result.narrow(0, first, count);
    block.addmm_(matrix, rows, /*beta=*/0, /*alpha=*/1 / std::sqrt(static_cast<double>(proj_dim)));
  }
  return result;
}

/// S = sqrt(n / proj_dim) * (proj_dim rows of F, without replacement) * (random signs), with F an orthonormal transform
/// of n = rows.size(0) elements: the DCT-II or the discrete Fourier transform in real numbers.
///
/// Both are computed from the first half V of the spectrum of the real transform:
/// F x = factor * (a * Re V + b * Im V) for element V_m. Row j of F has m = j for j <= n / 2, and m = n - j above:
///   dft  a, b = 1, 0 and, above, 0, 1; factor = sqrt(2 / n)
///   dct  a, b = cos t, sin t and, above, sin t, -cos t, with t = pi m / (2 n); V is computed from the
///        even elements followed by the odd ones in reverse (Makhoul, 1980)
/// factor is sqrt(1 / n) for j = 0 and, for the dft, also for j = n / 2.
at::Tensor project_transform(RandomMatmul matmul, const at::Tensor& rows, int64_t proj_dim, const at::Tensor& seed) {
  const int64_t n = rows.size(0);
  const bool is_dct = matmul == RandomMatmul::dct;
  RandomNumbers random(seed);
  const at::TensorOptions options = rows.options().dtype(compute_dtype(rows));
  const at::Tensor signs = random.signs({n, 1}, options);
  const at::Tensor kept = random.permutation(n).narrow(0, 0, proj_dim);

  const at::Tensor is_above = kept.gt(n / 2);
  const at::Tensor element = at::where(is_above, n - kept, kept);
  const at::Tensor angle =
      is_dct ? element.to(options.dtype()).mul_(std::numbers::pi / (2 * static_cast<double>(n))) : at::Tensor();
  at::Tensor real = is_dct ? at::where(is_above, angle.sin(), angle.cos()) : is_above.logical_not().to(options.dtype());
  at::Tensor imaginary = is_dct ? at::where(is_above, angle.cos().neg(), angle.sin()) : is_above.to(options.dtype());
  const at::Tensor is_alone = is_dct ? kept.eq(0) : kept.eq(0).logical_or(kept.mul(2).eq(n));
  // sqrt(n / proj_dim) times the factor in the comment above.
  const auto factor = [&](double numerator) { return std::sqrt(numerator / static_cast<double>(proj_dim)); };
  const at::Tensor factors = at::where(is_alone, at::full({}, factor(1), options), at::full({}, factor(2), options));
  real = real.mul_(factors).unsqueeze(1);
  imaginary = imaginary.mul_(factors).unsqueeze(1);

  at::Tensor result = at::empty({proj_dim, rows.size(1)}, rows.options());
  const int64_t width = std::max<int64_t>(1, transform_block / n);
  for (int64_t first = 0; first < rows.size(1); first += width) {
    const int64_t count = std::min(width, rows.size(1) - first);
    at::Tensor block = rows.narrow(1, first, count).to(options.dtype()).mul(signs);
    if (is_dct) {
      block = at::cat({block.slice(0, 0, n, 2), block.slice(0, 1, n, 2).flip(0)});
    }
    const at::Tensor spectrum = at::fft_rfft(block, std::nullopt, /*dim=*/0).index_select(0, element);
    result.narrow(1, first, count).copy_(at::real(spectrum).mul(real).addcmul_(at::imag(spectrum), imaginary));
  }
  return result;
}

/// Euclidean norm of each row, float64.
at::Tensor row_norms(const at::Tensor& rows) {
  const int64_t height = std::max<int64_t>(1, matrix_block / std::max<int64_t>(1, rows.size(1)));
  at::Tensor result = at::empty({rows.size(0)}, rows.options().dtype(at::kDouble));
  for (int64_t first = 0; first < rows.size(0); first += height) {
    const int64_t count = std::min(height, rows.size(0) - first);
    result.narrow(0, first, count)
        .copy_(at::linalg_vector_norm(rows.narrow(0, first, count), 2, at::IntArrayRef{1}, false, compute_dtype(rows)));
  }
  return result;
}

/// The rows `indices` of `rows`, each multiplied by its scale.
at::Tensor scaled_rows(const at::Tensor& rows, const at::Tensor& indices, const at::Tensor& scales) {
  return rows.index_select(0, indices).mul_(scales.to(compute_dtype(rows)).unsqueeze(1));
}

/// mass / norm, and 0 for rows of zeros, which are picked only if there are no others.
at::Tensor inverse_probability(const at::Tensor& mass, const at::Tensor& norms) {
  return at::where(norms.gt(0), mass.div(norms), at::zeros({}, norms.options()));
}

/// Column-row sampling: draws rows i with replacement, with probability p_i in proportion to their norms, and scales
/// them by 1 / (proj_dim * p_i).
std::tuple<at::Tensor, at::Tensor> pick_crs(const at::Tensor& rows, int64_t proj_dim, const at::Tensor& seed) {
  RandomNumbers random(seed);
  const at::Tensor norms = row_norms(rows);
  const at::Tensor cumulative = norms.cumsum(0);
  const at::Tensor total = cumulative.narrow(0, rows.size(0) - 1, 1);
  // Not at::multinomial, which takes at most 2^24 rows and raises if all are zeros.
  const at::Tensor points = random.uniform(proj_dim).mul_(total);
  const at::Tensor indices =
      at::searchsorted(cumulative, points, /*out_int32=*/false, /*right=*/true).clamp_max_(rows.size(0) - 1);
  const at::Tensor scales = inverse_probability(total.div(proj_dim), norms.index_select(0, indices));
  return {scaled_rows(rows, indices, scales), indices};
}

/// Winner-take-all column-row sampling (arXiv:2305.15265): takes the m rows with the largest norms unchanged, and draws
/// proj_dim - m of the others by column-row sampling; m minimizes (mass of the others) / (proj_dim - m). Nothing here
/// waits for the device: m stays there.
std::tuple<at::Tensor, at::Tensor> pick_wta_crs(const at::Tensor& rows, int64_t proj_dim, const at::Tensor& seed) {
  RandomNumbers random(seed);
  const auto [norms, order] = row_norms(rows).sort(/*stable=*/true, /*dim=*/0, /*descending=*/true);
  const at::Tensor cumulative = norms.cumsum(0);
  const at::Tensor total = cumulative.narrow(0, rows.size(0) - 1, 1);
  const at::Tensor counts = at::arange(proj_dim, norms.options().dtype(at::kLong));
  // Mass of the first 0, 1, ..., proj_dim - 1 rows.
  const at::Tensor head = at::cat({at::zeros({1}, norms.options()), cumulative.narrow(0, 0, proj_dim - 1)});
  const at::Tensor winners = (total - head).div_(proj_dim - counts).argmin(0, /*keepdim=*/true);
  const at::Tensor start = head.index_select(0, winners);
  const at::Tensor tail = total - start;
  const at::Tensor points = random.uniform(proj_dim).mul_(tail).add_(start);
  const at::Tensor drawn = at::maximum(
      at::searchsorted(cumulative, points, /*out_int32=*/false, /*right=*/true).clamp_max_(rows.size(0) - 1), winners);
  const at::Tensor is_winner = counts.lt(winners);
  const at::Tensor places = at::where(is_winner, counts, drawn);
  const at::Tensor scales = at::where(
      is_winner, at::ones({}, norms.options()),
      inverse_probability(tail.div(proj_dim - winners), norms.index_select(0, places)));
  const at::Tensor indices = order.index_select(0, places);
  return {scaled_rows(rows, indices, scales), indices};
}

}  // namespace

RandomMatmul parse_matmul(const char* op, std::string_view name) {
  if (name == "gaussian")
    return RandomMatmul::gaussian;
  if (name == "rademacher")
    return RandomMatmul::rademacher;
  if (name == "dct")
    return RandomMatmul::dct;
  if (name == "dft")
    return RandomMatmul::dft;
  if (name == "crs")
    return RandomMatmul::crs;
  if (name == "wta-crs")
    return RandomMatmul::wta_crs;
  TORCH_CHECK_VALUE(
      false, op, ": matmul is '", name, "', expected 'gaussian', 'rademacher', 'dct', 'dft', 'crs' or 'wta-crs'");
}

at::Tensor project_rows(RandomMatmul matmul, const at::Tensor& rows, int64_t proj_dim, const at::Tensor& seed) {
  const bool is_dense = matmul == RandomMatmul::gaussian || matmul == RandomMatmul::rademacher;
  return is_dense ? project_dense(matmul, rows, proj_dim, seed) : project_transform(matmul, rows, proj_dim, seed);
}

std::tuple<at::Tensor, at::Tensor> pick_rows(
    RandomMatmul matmul, const at::Tensor& rows, int64_t proj_dim, const at::Tensor& seed) {
  return matmul == RandomMatmul::crs ? pick_crs(rows, proj_dim, seed) : pick_wta_crs(rows, proj_dim, seed);
}

}  // namespace lomem::detail
