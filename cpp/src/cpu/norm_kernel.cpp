// Norms on the CPU. A row is processed in tiles that are converted to double in a stack buffer,
// so that one kernel serves every mix of dtypes, and every sum and formula is evaluated in double
// and rounded once: a float32 mean alone would cost digits where |mean| >> standard deviation.
#include <lomem/kernels.h>

#include <algorithm>
#include <cmath>

namespace lomem::cpu {
namespace {

constexpr int tile_size = 1024;

struct Tile {
  double values[tile_size];

  double operator[](int j) const {
    return values[j];
  }
};

void load(const Array& array, std::int64_t offset, int count, Tile& tile) {
  visit_dtype(array.dtype, [&](auto element) {
    using T = typename decltype(element)::type;
    const T* source = static_cast<const T*>(array.data) + offset;
    for (int j = 0; j < count; ++j) {
      tile.values[j] = to_compute(source[j]);
    }
  });
}

double load_scalar(const Array& array, std::int64_t index) {
  return array.dtype == DType::float64 ? static_cast<const double*>(array.data)[index]
                                       : static_cast<const float*>(array.data)[index];
}

/// Sum of term(j) over a tile in a fixed order that the compiler can vectorise.
template <class Term>
double sum_tile(int count, Term&& term) {
  constexpr int lanes = 8;
  double partial[lanes] = {};
  int j = 0;
  for (; j + lanes <= count; j += lanes) {
    for (int lane = 0; lane < lanes; ++lane) {
      partial[lane] += term(j + lane);
    }
  }
  for (int lane = 0; j < count; ++j, ++lane) {
    partial[lane] += term(j);
  }
  return ((partial[0] + partial[4]) + (partial[1] + partial[5])) +
         ((partial[2] + partial[6]) + (partial[3] + partial[7]));
}

/// A tile of weight and bias: 1 and 0 where there is none.
struct Parameters {
  Tile gamma;
  Tile beta;

  void load(const Array& weight, const Array& bias, std::int64_t offset, int count) {
    std::fill_n(gamma.values, count, 1.0);
    std::fill_n(beta.values, count, 0.0);
    if (weight.data != nullptr) {
      cpu::load(weight, offset, count, gamma);
    }
    if (bias.data != nullptr) {
      cpu::load(bias, offset, count, beta);
    }
  }
};

/// Calls body(offset in the row, count) for the tiles of a row.
template <class Body>
void for_each_tile(std::int64_t cols, Body&& body) {
  for (std::int64_t begin = 0; begin < cols; begin += tile_size) {
    body(begin, static_cast<int>(std::min<std::int64_t>(tile_size, cols - begin)));
  }
}

}  // namespace

void store(const double* values, std::int64_t n, MutableArray target, std::int64_t offset) {
  visit_dtype(target.dtype, [&](auto element) {
    using T = typename decltype(element)::type;
    T* destination = static_cast<T*>(target.data) + offset;
    for (std::int64_t j = 0; j < n; ++j) {
      destination[j] = from_double<T>(values[j]);
    }
  });
}

std::int64_t find_below(const Array& array, std::int64_t n, double magnitude) {
  std::int64_t found = -1;
  Tile tile;
  for_each_tile(n, [&](std::int64_t offset, int count) {
    if (found >= 0) {
      return;
    }
    load(array, offset, count, tile);
    const double* small =
        std::find_if(tile.values, tile.values + count, [&](double x) { return std::fabs(x) < magnitude; });
    found = small == tile.values + count ? -1 : offset + (small - tile.values);
  });
  return found;
}

template <Norm norm>
void norm_forward(const NormForward& args, std::int64_t begin, std::int64_t end) {
  const double cols = static_cast<double>(args.cols);
  const bool affine = args.weight.data != nullptr || args.bias.data != nullptr;
  // Rows of one tile are converted once, and their parameters once for all rows.
  const bool one_tile = args.cols <= tile_size;
  Tile x;
  Tile y;
  Parameters parameters;
  for (std::int64_t row = begin; row < end; ++row) {
    const std::int64_t base = row * args.cols;
    if (one_tile) {
      load(args.input, base, static_cast<int>(args.cols), x);
    }
    // visit(offset, count) with the tile in x.
    const auto for_each_input_tile = [&](auto&& visit) {
      for_each_tile(args.cols, [&](std::int64_t offset, int count) {
        if (!one_tile) {
          load(args.input, base + offset, count, x);
        }
        visit(offset, count);
      });
    };

    double mean = 0;
    if constexpr (norm == Norm::layer) {
      double sum = 0;
      for_each_input_tile([&](std::int64_t, int count) { sum += sum_tile(count, [&](int j) { return x[j]; }); });
      mean = args.cols > 0 ? sum / cols : 0;
    }
    double sum = 0;
    double sum_of_squares = 0;
    for_each_input_tile([&](std::int64_t, int count) {
      sum_of_squares += sum_tile(count, [&](int j) { return (x[j] - mean) * (x[j] - mean); });
      if constexpr (norm == Norm::layer) {
        sum += sum_tile(count, [&](int j) { return x[j] - mean; });
      }
    });
    const double moment = args.cols > 0 ? norm_variance(sum_of_squares, sum, cols) : 0;
    const double rstd = norm_rstd(moment, args.eps);
    store(&rstd, 1, args.rstd, row);
    if (args.cols > 0) {
      mean += sum / cols;  // What rounding left in the mean; 0 for RMSNorm.
    }

    for_each_input_tile([&](std::int64_t offset, int count) {
      for (int j = 0; j < count; ++j) {
        y.values[j] = norm_value(x[j], mean, rstd);
      }
      if (affine) {
        if (!one_tile || row == begin) {
          parameters.load(args.weight, args.bias, offset, count);
        }
        for (int j = 0; j < count; ++j) {
          y.values[j] = norm_affine(y[j], parameters.gamma[j], parameters.beta[j]);
        }
      }
      store(y.values, count, args.output, base + offset);
    });
  }
}

template LOMEM_API void norm_forward<Norm::layer>(const NormForward&, std::int64_t, std::int64_t);
template LOMEM_API void norm_forward<Norm::rms>(const NormForward&, std::int64_t, std::int64_t);

template <Norm norm>
void norm_backward(
    const NormBackward& args, std::int64_t begin, std::int64_t end, double* grad_weight, double* grad_bias) {
  const double cols = static_cast<double>(args.cols);
  const bool one_tile = args.cols <= tile_size;
  const bool affine = args.weight.data != nullptr || args.bias.data != nullptr;
  const double smallest = smallest_normal(args.output.dtype);
  Tile g;
  Tile y;
  Parameters parameters;
  Tile inverse_gamma;

  // Leaves grad_z in g, and y in y.
  const auto load_tile = [&](std::int64_t row, std::int64_t offset, int count) {
    load(args.grad_output, row * args.cols + offset, count, g);
    load(args.output, row * args.cols + offset, count, y);
    if (affine) {
      if (!one_tile || row == begin) {
        parameters.load(args.weight, args.bias, offset, count);
        for (int j = 0; j < count; ++j) {
          inverse_gamma.values[j] = norm_inverse(parameters.gamma[j], smallest);
        }
      }
      for (int j = 0; j < count; ++j) {
        y.values[j] = norm_recover(y[j], inverse_gamma[j], parameters.beta[j]);
      }
    }
  };
  // From grad_z to g = gamma * grad_z.
  const auto scale_tile = [&](int count) {
    if (affine) {
      for (int j = 0; j < count; ++j) {
        g.values[j] *= parameters.gamma[j];
      }
    }
  };

  for (std::int64_t row = begin; row < end; ++row) {
    const double rstd = load_scalar(args.rstd, row);
    double sum_g = 0;
    double sum_gy = 0;
    for_each_tile(args.cols, [&](std::int64_t offset, int count) {
      load_tile(row, offset, count);
      if (grad_weight != nullptr) {
        for (int j = 0; j < count; ++j) {
          grad_weight[offset + j] += g[j] * y[j];
        }
      }
      if (grad_bias != nullptr) {
        for (int j = 0; j < count; ++j) {
          grad_bias[offset + j] += g[j];
        }
      }
      scale_tile(count);
      sum_gy += sum_tile(count, [&](int j) { return g[j] * y[j]; });
      if constexpr (norm == Norm::layer) {
        sum_g += sum_tile(count, [&](int j) { return g[j]; });
      }
    });
    if (args.grad_input.data == nullptr) {
      continue;
    }
    const double mean_g = sum_g / cols;
    const double mean_gy = sum_gy / cols;
    for_each_tile(args.cols, [&](std::int64_t offset, int count) {
      if (!one_tile) {
        load_tile(row, offset, count);
        scale_tile(count);
      }
      for (int j = 0; j < count; ++j) {
        g.values[j] = norm_gradient(g[j], y[j], rstd, mean_g, mean_gy);
      }
      store(g.values, count, args.grad_input, row * args.cols + offset);
    });
  }
}

template LOMEM_API void norm_backward<Norm::layer>(const NormBackward&, std::int64_t, std::int64_t, double*, double*);
template LOMEM_API void norm_backward<Norm::rms>(const NormBackward&, std::int64_t, std::int64_t, double*, double*);

}  // namespace lomem::cpu
