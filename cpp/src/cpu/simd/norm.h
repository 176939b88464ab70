// Norms. Rows with float64 are computed in double, others in float32, except that sums over a row are accumulated in
// double after at most 32 terms, and that the mean is represented by two numbers, a nearby one and the rest, to twice
// the digits of float32. Otherwise results would lose digits where |mean| >> standard deviation.
//
// A row is read from memory once; what is needed again is kept in a buffer. For 16-bit elements, two rows are computed
// at a time, so that one is loaded while the other waits for its sums.
#pragma once

#include <lomem/core/norm.h>

#include "rows.h"

namespace lomem::cpu {
namespace {

/// Rows up to this length are kept between passes, and parameters up to this length are converted once for all rows.
/// Longer ones are read and converted again.
constexpr std::int64_t kept_cols = 4096;

/// Two rows of up to this length fit in the L1 cache together with the data they need.
constexpr std::int64_t paired_cols = 2048;

/// (The padding keeps rows apart in the cache: stores and loads that are 4 KiB apart collide.)
template <class C>
struct alignas(64) KeptRow {
  C values[kept_cols + 5 * 64 / sizeof(C)];
};

/// norm_inverse for each lane.
inline Floats inverse_of(const Floats& gamma, float smallest) {
  const Floats magnitude = bits_of<Floats>(bits_of<Words>(gamma) & 0x7fffffffu);
  return magnitude < smallest ? broadcast(NAN) : 1.0f / gamma;
}

[[gnu::noinline]] Doubles inverse_of(const Doubles& gamma, double smallest) {
  double values[lanes];
  store_as<double>(gamma, values, false);
  for (double& value : values) {
    value = norm_inverse(value, smallest);
  }
  return load_as<double>(values);
}

/// Weight, bias and 1 / weight as C; 1, 0 and 1 if absent.
template <class C, bool keep>
class Parameters;

template <class C>
class Parameters<C, false> {
 public:
  /// `smallest`: see norm_inverse.
  Parameters(const Array& weight, const Array& bias, std::int64_t /*cols*/, double smallest)
      : weight_(weight), bias_(bias), smallest_(static_cast<C>(smallest)) {}

  template <class Part>
  Vector<C> gamma(std::int64_t j, Part part) const {
    return weight_.array.data != nullptr ? weight_.load(j, part) : broadcast(C(1));
  }
  template <class Part>
  Vector<C> beta(std::int64_t j, Part part) const {
    return bias_.array.data != nullptr ? bias_.load(j, part) : broadcast(C(0));
  }
  template <class Part>
  Vector<C> inverse_gamma(std::int64_t j, Part part) const {
    return inverse_of(gamma(j, part), smallest_);
  }

 private:
  Source<C, Any> weight_;
  Source<C, Any> bias_;
  C smallest_;
};

template <class C>
class Parameters<C, true> {
 public:
  Parameters(const Array& weight, const Array& bias, std::int64_t cols, double smallest) {
    const Parameters<C, false> source(weight, bias, cols, smallest);
    // Zeros beyond the row, so that loads there do not turn zeros into NaN.
    for (std::int64_t j = 0; j < padded(cols); j += lanes) {
      const Partial part = part_of(cols - j);
      store_as<C>(source.gamma(j, part), gammas_.values + j, false);
      store_as<C>(source.beta(j, part), betas_.values + j, false);
      store_as<C>(source.inverse_gamma(j, part), inverses_.values + j, false);
    }
  }

  template <class Part>
  Vector<C> gamma(std::int64_t j, Part) const {
    return load_as<C>(gammas_.values + j);
  }
  template <class Part>
  Vector<C> beta(std::int64_t j, Part) const {
    return load_as<C>(betas_.values + j);
  }
  template <class Part>
  Vector<C> inverse_gamma(std::int64_t j, Part) const {
    return load_as<C>(inverses_.values + j);
  }

 private:
  KeptRow<C> gammas_;
  KeptRow<C> betas_;
  KeptRow<C> inverses_;
};

struct NoParameters {
  NoParameters(const Array&, const Array&, std::int64_t, double) {}
};

/// Types that a kernel is compiled for. `C` is the arithmetic type; `T` is the element type of input and output, or
/// Any.
template <Norm norm_, class C_, class T_, bool affine_, bool keep_>
struct NormTypes {
  static constexpr Norm norm = norm_;
  static constexpr bool centred = norm_ == Norm::layer;
  static constexpr bool affine = affine_;
  static constexpr bool keep = keep_;
  using C = C_;
  using T = T_;
  using V = Vector<C>;
  using Parameters = std::conditional_t<affine, cpu::Parameters<C, keep>, NoParameters>;

  /// The backward pass reads float32 rows from the cache again: two kept copies would not fit next to them.
  static constexpr bool keep_backward = keep && !std::is_same_v<T, float>;

  /// Number of rows processed at a time. (Two rows of float32 were slower: one saturates the memory.)
  static constexpr int rows = keep && sizeof(T) == 2 ? 2 : 1;
};

inline double load_rstd(const Array& array, std::int64_t row) {
  return array.dtype == DType::float64 ? static_cast<const double*>(array.data)[row]
                                       : static_cast<const float*>(array.data)[row];
}

inline void store_rstd(double rstd, const MutableArray& array, std::int64_t row) {
  if (array.dtype == DType::float64) {
    static_cast<double*>(array.data)[row] = rstd;
  } else {
    static_cast<float*>(array.data)[row] = static_cast<float>(rstd);
  }
}

/// Whether float32 sums of squares gave `moment` to full precision: no square overflowed, none that matters was
/// subnormal, and no difference of two finite elements was infinite, which makes NaN.
inline bool is_exact_enough(double moment, double eps) {
  return moment <= 1e36 && moment + eps >= 1e-28;
}

/// The mean of the first elements of a row. It is close to the mean of the whole row except for unusual rows.
template <class C, class T>
inline C first_mean(const Source<C, T>& input, std::int64_t row, std::int64_t cols) {
  const std::int64_t n = cols < partial_sums ? cols : partial_sums;
  double total[1];
  sum_over<C>(n, total, [&](auto& sums, std::int64_t j, auto vector, auto part) __attribute__((always_inline)) {
    sums[0].add(vector, input.load(row * cols + j, part));
  });
  return n > 0 ? static_cast<C>(total[0] / static_cast<double>(n)) : C(0);
}

/// How the mean of a row is found. at_once: sums are taken of differences from the mean of the row's first elements.
/// The variance is then the mean square of these differences minus the square of their mean, which loses digits if the
/// latter is a large part of the former. before: the mean is known, to twice the digits of C, when the squares are
/// added.
enum class MeanFound { at_once, before };

/// Outcome of processing rows: done, the mean must be found before, or the range of C is too small for them.
enum class Outcome { done, mean_too_far, out_of_range };

/// Processes `count` rows starting at `row`.
template <class Types, int count, MeanFound mean_found>
inline Outcome norm_forward_block(
    const NormForward& args, std::int64_t row, const typename Types::Parameters& parameters,
    KeptRow<typename Types::C>* kept, bool stream) {
  using C = typename Types::C;
  using V = typename Types::V;
  constexpr bool before = mean_found == MeanFound::before;
  const std::int64_t cols = args.cols;
  const double n = static_cast<double>(cols);
  const Source<C, typename Types::T> input(args.input);
  const Target<C, typename Types::T> output(args.output, stream);

  // The reference point of the differences: a C and, if the mean is known, a second C with the remainder.
  V high[count];
  V low[count];
  if constexpr (Types::centred) {
    C first[count];
    for (int r = 0; r < count; ++r) {
      first[r] = first_mean(input, row + r, cols);
      high[r] = broadcast(first[r]);
    }
    if constexpr (before) {
      double distance[count];
      sum_over<C>(
          cols, distance, [&](auto& sums, std::int64_t j, auto vector, auto part) __attribute__((always_inline)) {
            for_rows<count>([&](auto r) __attribute__((always_inline)) {
              sums[r.value].add(vector, only(input.load((row + r.value) * cols + j, part) - high[r.value], part));
            });
          });
      for (int r = 0; r < count; ++r) {
        const double shift = cols > 0 ? distance[r] / n : 0;
        const C mean = static_cast<C>(first[r] + shift);
        high[r] = broadcast(mean);
        low[r] = broadcast(static_cast<C>((static_cast<double>(first[r]) - mean) + shift));
      }
    }
  }
  const auto distance = [&](auto r, std::int64_t j, auto part) __attribute__((always_inline)) {
    const V x = input.load((row + r.value) * cols + j, part);
    if constexpr (!Types::centred) {
      return x;
    } else if constexpr (before) {
      return only((x - high[r.value]) - low[r.value], part);
    } else {
      return only(x - high[r.value], part);
    }
  };

  // Even entries are sums of differences (0 for RMSNorm), odd entries are sums of their squares.
  double totals[2 * count];
  sum_over<C>(cols, totals, [&](auto& sums, std::int64_t j, auto vector, auto part) __attribute__((always_inline)) {
    for_rows<count>([&](auto r) __attribute__((always_inline)) {
      const V d = distance(r, j, part);
      if constexpr (Types::centred) {
        sums[2 * r.value].add(vector, d);
      }
      sums[2 * r.value + 1].add(vector, d * d);
      if constexpr (Types::keep) {
        store_as<C>(d, kept[r.value].values + j, false);
        input.prefetch((row + count + r.value) * cols + j, vector);
        if constexpr (sizeof(typename Types::T) == 2) {
          output.prefetch((row + r.value) * cols + j, vector);
        }
      }
    });
  });
  V mean_high[count];
  V mean_low[count];
  V scale[count];
  for (int r = 0; r < count; ++r) {
    const double mean = cols > 0 ? totals[2 * r] / n : 0;
    const double moment = cols > 0 ? norm_variance(totals[2 * r + 1], totals[2 * r], n) : 0;
    if (sizeof(C) < sizeof(double) && !is_exact_enough(moment, args.eps)) {
      return Outcome::out_of_range;
    }
    // (Also true if double overflows and both are NaN.)
    if (!before && !(mean * mean <= moment)) {
      return Outcome::mean_too_far;
    }
    const double rstd = norm_rstd(moment, args.eps);
    store_rstd(rstd, args.rstd, row + r);
    scale[r] = broadcast(static_cast<C>(rstd));
    mean_high[r] = broadcast(static_cast<C>(mean));
    mean_low[r] = broadcast(static_cast<C>(mean - static_cast<C>(mean)));
  }

  for_each_vector(0, cols, [&](std::int64_t j, auto, auto part) __attribute__((always_inline)) {
    for_rows<count>([&](auto r) __attribute__((always_inline)) {
      V d;
      if constexpr (Types::keep) {
        d = load_as<C>(kept[r.value].values + j);
      } else {
        d = distance(r, j, part);
      }
      if constexpr (Types::centred) {
        d = (d - mean_high[r.value]) - mean_low[r.value];
      }
      V y = d * scale[r.value];
      if constexpr (Types::affine) {
        y = norm_affine(y, parameters.gamma(j, part), parameters.beta(j, part));
      }
      output.store((row + r.value) * cols + j, y, part);
    });
  });
  return Outcome::done;
}

template <class Types>
void norm_forward_rows(const NormForward& args, std::int64_t begin, std::int64_t end, bool stream) {
  using C = typename Types::C;
  const typename Types::Parameters parameters(args.weight, args.bias, args.cols, 0);
  KeptRow<C> kept[Types::rows];
  std::int64_t row = begin;
  const auto one_row = [&] {
    Outcome outcome = norm_forward_block<Types, 1, MeanFound::at_once>(args, row, parameters, kept, stream);
    if (outcome == Outcome::mean_too_far) {
      outcome = norm_forward_block<Types, 1, MeanFound::before>(args, row, parameters, kept, stream);
    }
    if constexpr (sizeof(C) < sizeof(double)) {
      if (outcome == Outcome::out_of_range) {
        norm_forward_rows<NormTypes<Types::norm, double, Any, Types::affine, false>>(args, row, row + 1, false);
      }
    }
    ++row;
  };
  if constexpr (Types::rows > 1) {
    while (args.cols <= paired_cols && row + Types::rows <= end) {
      if (norm_forward_block<Types, Types::rows, MeanFound::at_once>(args, row, parameters, kept, stream) ==
          Outcome::done) {
        row += Types::rows;
      } else {
        // One by one, so that a row's result does not depend on its neighbors.
        for (int r = 0; r < Types::rows; ++r) {
          one_row();
        }
      }
    }
  }
  while (row < end) {
    one_row();
  }
  if (stream) {
    stream_fence();
  }
}

/// Loads the inputs of the backward pass of a row.
template <class Types>
struct BackwardSource {
  using C = typename Types::C;
  using V = typename Types::V;

  Source<C, typename Types::T> grad_output;
  Source<C, typename Types::T> output;
  const typename Types::Parameters& parameters;

  template <class Part>
  V grad(std::int64_t i, Part part) const {
    return grad_output.load(i, part);
  }

  /// The normalized input.
  template <class Part>
  V y(std::int64_t i, std::int64_t j, Part part) const {
    const V z = output.load(i, part);
    if constexpr (Types::affine) {
      return only(norm_recover(z, parameters.inverse_gamma(j, part), parameters.beta(j, part)), part);
    } else {
      return z;
    }
  }

  template <class Part>
  V scaled(const V& grad, std::int64_t j, Part part) const {
    if constexpr (Types::affine) {
      return grad * parameters.gamma(j, part);
    } else {
      return grad;
    }
  }
};

/// Values that the backward pass of a row needs twice.
template <class C>
struct BackwardRow {
  C mean_g;
  C mean_gy;
  KeptRow<C> grad;
  KeptRow<C> y;
};

/// Sums over rows for the gradients of weight and bias. If rows are kept, at most 32 terms are added in C before they
/// are added in double.
template <class C, bool keep>
class ParameterSums {
 public:
  ParameterSums(double* weight, double* bias, std::int64_t cols) : weight_(weight), bias_(bias), cols_(cols) {
    if constexpr (keep) {
      clear();
    }
  }

  template <class Part>
  void add(std::int64_t j, const Vector<C>& weight_terms, const Vector<C>& bias_terms, Part part) {
    if constexpr (keep) {
      store_as<C>(load_as<C>(weights_.values + j) + weight_terms, weights_.values + j, false);
      store_as<C>(load_as<C>(biases_.values + j) + bias_terms, biases_.values + j, false);
    } else {
      add_in_double(j, weight_terms, weight_, part);
      add_in_double(j, bias_terms, bias_, part);
    }
  }

  /// Must be called after each `rows` rows.
  void count(int rows) {
    rows_ += rows;
    if (rows_ >= most_rows) {
      flush();
    }
  }

  void flush() {
    if constexpr (keep) {
      for_each_vector(0, cols_, [&](std::int64_t j, auto, auto part) {
        add_in_double(j, load_as<C>(weights_.values + j), weight_, part);
        add_in_double(j, load_as<C>(biases_.values + j), bias_, part);
      });
      clear();
    }
    rows_ = 0;
  }

 private:
  static constexpr int most_rows = 32;

  void clear() {
    for (std::int64_t j = 0; j < padded(cols_); j += lanes) {
      store_as<C>(Vector<C>{}, weights_.values + j, false);
      store_as<C>(Vector<C>{}, biases_.values + j, false);
    }
  }

  template <class Part>
  static void add_in_double(std::int64_t j, const Vector<C>& terms, double* sums, Part part) {
    if (sums != nullptr) {
      store_as<double>(load_as<double>(sums + j, part) + as_doubles(terms), sums + j, false, part);
    }
  }

  double* weight_;
  double* bias_;
  std::int64_t cols_;
  int rows_ = 0;
  KeptRow<C> weights_;
  KeptRow<C> biases_;
};

/// Computes the sums over each of `count` rows starting at `row` and, with `parameters`, the sums over rows. Keeps the
/// loaded data.
template <class Types, int count, bool parameters>
inline void norm_backward_sums(
    const BackwardSource<Types>& source, std::int64_t row, std::int64_t cols,
    const Target<typename Types::C, typename Types::T>& grad_input, BackwardRow<typename Types::C>* kept,
    ParameterSums<typename Types::C, Types::keep>* over_rows) {
  using C = typename Types::C;
  using V = typename Types::V;
  const BackwardSource<Types> from = source;
  // Even entries are sums of g (0 for RMSNorm, whose mean_g is 0), odd entries are sums of g * y.
  double totals[2 * count];
  sum_over<C>(cols, totals, [&](auto& sums, std::int64_t j, auto vector, auto part) __attribute__((always_inline)) {
    V weight_terms{};
    V bias_terms{};
    for_rows<count>([&](auto r) __attribute__((always_inline)) {
      const V grad = from.grad((row + r.value) * cols + j, part);
      const V y = from.y((row + r.value) * cols + j, j, part);
      const V g = from.scaled(grad, j, part);
      // (float32 without weights is fastest with hardware prefetching only.)
      if constexpr (sizeof(typename Types::T) == 2 || Types::affine) {
        from.grad_output.prefetch((row + count + r.value) * cols + j, vector);
        from.output.prefetch((row + count + r.value) * cols + j, vector);
      }
      if constexpr (sizeof(typename Types::T) == 2) {
        grad_input.prefetch((row + r.value) * cols + j, vector);
      }
      if constexpr (Types::centred) {
        sums[2 * r.value].add(vector, g);
      }
      sums[2 * r.value + 1].add(vector, g * y);
      if constexpr (Types::keep_backward) {
        store_as<C>(grad, kept[r.value].grad.values + j, false);
        store_as<C>(y, kept[r.value].y.values + j, false);
      }
      if constexpr (parameters) {
        weight_terms += grad * y;
        bias_terms += grad;
      }
    });
    if constexpr (parameters) {
      over_rows->add(j, weight_terms, bias_terms, part);
    }
  });
  for (int r = 0; r < count; ++r) {
    kept[r].mean_g = static_cast<C>(totals[2 * r] / static_cast<double>(cols));
    kept[r].mean_gy = static_cast<C>(totals[2 * r + 1] / static_cast<double>(cols));
  }
}

template <class Types, int count>
inline void norm_backward_input(
    const BackwardSource<Types>& source, const NormBackward& args, std::int64_t row,
    const Target<typename Types::C, typename Types::T>& grad_input, const BackwardRow<typename Types::C>* kept) {
  using C = typename Types::C;
  using V = typename Types::V;
  const std::int64_t cols = args.cols;
  const BackwardSource<Types> from = source;
  V rstd[count];
  V mean_g[count];
  V mean_gy[count];
  for (int r = 0; r < count; ++r) {
    rstd[r] = broadcast(static_cast<C>(load_rstd(args.rstd, row + r)));
    mean_g[r] = broadcast(kept[r].mean_g);
    mean_gy[r] = broadcast(kept[r].mean_gy);
  }
  for_each_vector(0, cols, [&](std::int64_t j, auto, auto part) __attribute__((always_inline)) {
    for_rows<count>([&](auto r) __attribute__((always_inline)) {
      const std::int64_t i = (row + r.value) * cols + j;
      V grad;
      V y;
      if constexpr (Types::keep_backward) {
        grad = load_as<C>(kept[r.value].grad.values + j);
        y = load_as<C>(kept[r.value].y.values + j);
      } else {
        grad = from.grad(i, part);
        y = from.y(i, j, part);
      }
      const V g = from.scaled(grad, j, part);
      grad_input.store(i, norm_gradient(g, y, rstd[r.value], mean_g[r.value], mean_gy[r.value]), part);
    });
  });
}

template <class Types, bool parameters>
void norm_backward_rows(
    const NormBackward& args, std::int64_t begin, std::int64_t end, double* grad_weight, double* grad_bias,
    bool stream) {
  using C = typename Types::C;
  const typename Types::Parameters converted(args.weight, args.bias, args.cols, smallest_normal(args.output.dtype));
  const BackwardSource<Types> source{
      Source<C, typename Types::T>(args.grad_output), Source<C, typename Types::T>(args.output), converted};
  const Target<C, typename Types::T> grad_input(args.grad_input, stream);
  ParameterSums<C, Types::keep> over_rows(grad_weight, grad_bias, args.cols);
  BackwardRow<C> kept[Types::rows];
  std::int64_t row = begin;
  const auto for_blocks = [&](auto count) {
    constexpr int rows = decltype(count)::value;
    for (; row + rows <= end; row += rows) {
      norm_backward_sums<Types, rows, parameters>(source, row, args.cols, grad_input, kept, &over_rows);
      if (parameters) {
        over_rows.count(rows);
      }
      if (args.grad_input.data != nullptr) {
        norm_backward_input<Types, rows>(source, args, row, grad_input, kept);
      }
    }
  };
  // (Weights and sums of long rows exceed the cache anyway: process two rows each time they are loaded.)
  if (Types::rows > 1 && (Types::affine || args.cols <= paired_cols)) {
    for_blocks(Index<Types::rows>{});
  }
  for_blocks(Index<1>{});
  if (parameters) {
    over_rows.flush();
  }
  if (stream) {
    stream_fence();
  }
}

/// Calls visitor(NormTypes<...>{}) with the types for rows of `dtype`, or Any unless `same`, i.e. all rows have that
/// dtype.
template <Norm norm, class Visitor>
inline void visit_norm_types(DType dtype, bool same, bool in_double, bool affine, bool keep, Visitor&& visitor) {
  const auto visit = [&](auto arithmetic, auto element, auto keeps) {
    using C = typename decltype(arithmetic)::type;
    using T = typename decltype(element)::type;
    constexpr bool keep_rows = decltype(keeps)::value != 0;
    if (affine) {
      visitor(NormTypes<norm, C, T, true, keep_rows>{});
    } else {
      visitor(NormTypes<norm, C, T, false, keep_rows>{});
    }
  };
  if (in_double) {
    visit(Type<double>{}, Type<Any>{}, Index<0>{});
  } else if (!keep) {
    visit(Type<float>{}, Type<Any>{}, Index<0>{});
  } else if (!same) {
    visit(Type<float>{}, Type<Any>{}, Index<1>{});
  } else if (dtype == DType::float32) {
    visit(Type<float>{}, Type<float>{}, Index<1>{});
  } else if (dtype == DType::bfloat16) {
    visit(Type<float>{}, Type<bfloat16>{}, Index<1>{});
  } else {
    visit(Type<float>{}, Type<float16>{}, Index<1>{});
  }
}

inline bool is_float64(const Array& array) {
  return array.data != nullptr && array.dtype == DType::float64;
}

/// Whether the rows of an output may be stored past the caches: vectors must start at multiples of their size.
template <class T>
inline bool can_stream(const MutableArray& array, std::int64_t cols) {
  return is_aligned(array.data, lanes * sizeof(T)) && cols % lanes == 0;
}

template <Norm norm>
void norm_forward(const NormForward& args, std::int64_t begin, std::int64_t end, bool stream) {
  const Array output{args.output.data, args.output.dtype};
  const bool in_double =
      is_float64(args.input) || is_float64(output) || is_float64(args.weight) || is_float64(args.bias);
  const bool affine = args.weight.data != nullptr || args.bias.data != nullptr;
  visit_norm_types<norm>(
      args.input.dtype, args.input.dtype == args.output.dtype, in_double, affine, args.cols <= kept_cols,
      [&](auto types) {
        using Types = decltype(types);
        norm_forward_rows<Types>(args, begin, end, stream && can_stream<typename Types::T>(args.output, args.cols));
      });
}

template <Norm norm>
void norm_backward(
    const NormBackward& args, std::int64_t begin, std::int64_t end, double* grad_weight, double* grad_bias,
    bool stream) {
  const Array grad_input{args.grad_input.data, args.grad_input.dtype};
  const bool in_double = is_float64(args.grad_output) || is_float64(args.output) || is_float64(args.rstd) ||
                         is_float64(args.weight) || is_float64(args.bias) || is_float64(grad_input);
  const bool affine = args.weight.data != nullptr || args.bias.data != nullptr;
  const DType dtype = args.grad_output.dtype;
  const bool same = dtype == args.output.dtype && (grad_input.data == nullptr || dtype == grad_input.dtype);
  visit_norm_types<norm>(dtype, same, in_double, affine, args.cols <= kept_cols, [&](auto types) {
    using Types = decltype(types);
    const bool streams = stream && can_stream<typename Types::T>(args.grad_input, args.cols);
    if (grad_weight != nullptr || grad_bias != nullptr) {
      norm_backward_rows<Types, true>(args, begin, end, grad_weight, grad_bias, streams);
    } else {
      norm_backward_rows<Types, false>(args, begin, end, nullptr, nullptr, streams);
    }
  });
}

}  // namespace
}  // namespace lomem::cpu
