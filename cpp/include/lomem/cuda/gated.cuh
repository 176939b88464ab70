// Gated units: bodies of CUDA kernels (see launch.cuh). A thread works on units, as many consecutive elements of a row
// as fill 16 bytes.
#pragma once

#include <lomem/core/gated.h>
#include <lomem/cuda/launch.cuh>
#include <lomem/cuda/vector.cuh>

#include <cstdint>

namespace lomem::cuda {

/// How units are distributed: neighboring threads take neighboring units.
template <class T>
struct GatedGrid {
  static constexpr int elements = max_access / sizeof(T);
  /// Number of units of a thread, whose loads are in flight together.
  static constexpr int units_per_thread = 2;
  static constexpr std::int64_t block_units = std::int64_t{units_per_thread} * threads_per_block;
  static constexpr std::int64_t block_elements = block_units * elements;

  std::int64_t rows;
  std::int64_t cols;
  std::int64_t units_per_row;
  /// Whether each whole unit is one vector in every tensor.
  bool vectors;

  GatedGrid(std::int64_t rows_, std::int64_t cols_)
      : rows(rows_), cols(cols_), units_per_row((cols_ + elements - 1) / elements), vectors(true) {}

  /// Notes a tensor whose rows are `stride` elements apart; null is none.
  void use(const void* data, std::int64_t stride) {
    const bool same_in_every_row = cols % elements == 0 && stride % elements == 0;
    vectors = vectors && (data == nullptr || (is_aligned(data, max_access) && (rows == 1 || same_in_every_row)));
  }

  std::int64_t blocks() const {
    return (rows * units_per_row + block_units - 1) / block_units;
  }

  /// Elements of a unit.
  struct Place {
    std::int64_t row;
    std::int64_t col;
    int count;  // fewer in the last unit of a row, none beyond the last row
  };
  LOMEM_HOST_DEVICE Place place(std::int64_t block, int thread, int u) const {
    const std::int64_t unit = block * block_units + u * threads_per_block + thread;
    const std::int64_t row = rows == 1 ? 0 : unit / units_per_row;
    const std::int64_t col = (unit - row * units_per_row) * elements;
    const std::int64_t rest = row < rows ? cols - col : 0;
    return {row, col, static_cast<int>(rest < 0 ? 0 : rest < elements ? rest : elements)};
  }

  /// Whether all units of a block are vectors.
  LOMEM_HOST_DEVICE bool is_full(std::int64_t block) const {
    return vectors && (block + 1) * block_elements <= rows * cols;
  }
};

/// Reads the operands.
template <class T>
struct GatedReader {
  static constexpr int elements = GatedGrid<T>::elements;
  using Place = typename GatedGrid<T>::Place;

  const T* gate;
  const T* up;
  std::int64_t gate_stride;
  std::int64_t up_stride;
  bool interleaved;

  explicit GatedReader(const GatedOperands& operands)
      : gate(static_cast<const T*>(operands.gate)),
        up(static_cast<const T*>(operands.up)),
        gate_stride(operands.gate_stride),
        up_stride(operands.up_stride),
        interleaved(operands.interleaved) {}

  void use(GatedGrid<T>& grid) const {
    grid.use(gate, gate_stride);
    if (!interleaved) {
      grid.use(up, up_stride);
    }
  }

  LOMEM_HOST_DEVICE void load(const Place& place, Vector<T, elements>& x, Vector<T, elements>& factor) const {
    if (interleaved) {
      const T* pairs = gate + place.row * gate_stride + 2 * place.col;
      const Vector<T, elements> first = load_vector<elements>(pairs);
      const Vector<T, elements> second = load_vector<elements>(pairs + elements);
      LOMEM_UNROLL
      for (int j = 0; j < elements / 2; ++j) {
        x[j] = first[2 * j];
        factor[j] = first[2 * j + 1];
        x[elements / 2 + j] = second[2 * j];
        factor[elements / 2 + j] = second[2 * j + 1];
      }
    } else {
      x = load_vector<elements>(gate + place.row * gate_stride + place.col);
      factor = load_vector<elements>(up + place.row * up_stride + place.col);
    }
  }

  LOMEM_HOST_DEVICE void load_one(const Place& place, int j, T& x, T& factor) const {
    if (interleaved) {
      const T* pair = gate + place.row * gate_stride + 2 * (place.col + j);
      x = pair[0];
      factor = pair[1];
    } else {
      x = gate[place.row * gate_stride + place.col + j];
      factor = up[place.row * up_stride + place.col + j];
    }
  }
};

/// activation(x) * factor, with both results rounded to T, as two kernels would.
template <class Function, class T>
LOMEM_HOST_DEVICE inline T gated_value(T x, T factor) {
  const T value = from_compute<T>(Function::value(to_compute(x)));
  return from_compute<T>(to_compute(value) * to_compute(factor));
}

/// The result of a gated unit, contiguous.
template <class Function, class T>
struct GatedForward {
  using Grid = GatedGrid<T>;
  using Shared = Nothing;
  static constexpr int elements = Grid::elements;

  Grid grid;
  GatedReader<T> reader;
  T* output;

  GatedForward(const GatedOperands& operands, void* output_)
      : grid(operands.rows, operands.cols), reader(operands), output(static_cast<T*>(output_)) {
    reader.use(grid);
    grid.use(output, operands.cols);
  }

  std::int64_t blocks() const {
    return grid.blocks();
  }
  LOMEM_HOST_DEVICE void prepare(std::int64_t /*block*/, int /*thread*/, Shared&) const {}

  LOMEM_HOST_DEVICE void operator()(std::int64_t block, int thread, const Shared&) const {
    typename Grid::Place place[Grid::units_per_thread];
    LOMEM_UNROLL
    for (int u = 0; u < Grid::units_per_thread; ++u) {
      place[u] = grid.place(block, thread, u);
    }
    if (grid.is_full(block)) {
      Vector<T, elements> x[Grid::units_per_thread];
      Vector<T, elements> factor[Grid::units_per_thread];
      LOMEM_UNROLL
      for (int u = 0; u < Grid::units_per_thread; ++u) {
        reader.load(place[u], x[u], factor[u]);
      }
      LOMEM_UNROLL
      for (int u = 0; u < Grid::units_per_thread; ++u) {
        LOMEM_UNROLL
        for (int j = 0; j < elements; ++j) {
          x[u][j] = gated_value<Function>(x[u][j], factor[u][j]);
        }
        store_vector(output + place[u].row * grid.cols + place[u].col, x[u]);
      }
    } else {
      for (int u = 0; u < Grid::units_per_thread; ++u) {
        const auto at = grid.place(block, thread, u);
        for (int j = 0; j < at.count; ++j) {
          T x, factor;
          reader.load_one(at, j, x, factor);
          output[at.row * grid.cols + at.col + j] = gated_value<Function>(x, factor);
        }
      }
    }
  }
};

/// The gradients of the operands, and the result again if asked for.
template <class Function, class T>
struct GatedBackward {
  using Grid = GatedGrid<T>;
  using Shared = Nothing;
  using C = compute_t<T>;
  static constexpr int elements = Grid::elements;

  Grid grid;
  GatedReader<T> reader;
  const T* grad_output;
  T* grad_gate;
  T* grad_up;
  std::int64_t stride;
  T* output;

  GatedBackward(const GatedOperands& operands, const void* grad_output_, const GatedGradients& gradients)
      : grid(operands.rows, operands.cols),
        reader(operands),
        grad_output(static_cast<const T*>(grad_output_)),
        grad_gate(static_cast<T*>(gradients.gate)),
        grad_up(static_cast<T*>(gradients.up)),
        stride(gradients.stride),
        output(static_cast<T*>(gradients.output)) {
    reader.use(grid);
    grid.use(grad_output, operands.cols);
    grid.use(grad_gate, stride);
    if (!reader.interleaved) {
      grid.use(grad_up, stride);
    }
    grid.use(output, operands.cols);
  }

  std::int64_t blocks() const {
    return grid.blocks();
  }
  LOMEM_HOST_DEVICE void prepare(std::int64_t /*block*/, int /*thread*/, Shared&) const {}

  LOMEM_HOST_DEVICE void operator()(std::int64_t block, int thread, const Shared&) const {
    if (grid.is_full(block)) {
      typename Grid::Place place[Grid::units_per_thread];
      Vector<T, elements> grad[Grid::units_per_thread];
      Vector<T, elements> x[Grid::units_per_thread];
      Vector<T, elements> factor[Grid::units_per_thread];
      LOMEM_UNROLL
      for (int u = 0; u < Grid::units_per_thread; ++u) {
        place[u] = grid.place(block, thread, u);
        grad[u] = load_vector<elements>(grad_output + place[u].row * grid.cols + place[u].col);
        reader.load(place[u], x[u], factor[u]);
      }
      LOMEM_UNROLL
      for (int u = 0; u < Grid::units_per_thread; ++u) {
        if (output != nullptr) {
          Vector<T, elements> result;
          LOMEM_UNROLL
          for (int j = 0; j < elements; ++j) {
            result[j] = gated_value<Function>(x[u][j], factor[u][j]);
          }
          store_vector(output + place[u].row * grid.cols + place[u].col, result);
        }
        LOMEM_UNROLL
        for (int j = 0; j < elements; ++j) {
          gradients(grad[u][j], x[u][j], factor[u][j]);
        }
        store(place[u], x[u], factor[u]);
      }
    } else {
      for (int u = 0; u < Grid::units_per_thread; ++u) {
        one_by_one(grid.place(block, thread, u));
      }
    }
  }

 private:
  /// Replaces the operands by their gradients.
  LOMEM_HOST_DEVICE static void gradients(T grad_of_output, T& x, T& factor) {
    const C grad = to_compute(grad_of_output);
    const auto [value, slope] = value_and_slope<Function, LibraryMath<C>>(to_compute(x));
    x = from_compute<T>(gate_gradient<Function>(grad * to_compute(factor), slope));
    factor = from_compute<T>(grad * value);
  }

  LOMEM_HOST_DEVICE void store(
      const typename Grid::Place& place, const Vector<T, elements>& of_gate, const Vector<T, elements>& of_up) const {
    if (reader.interleaved) {
      if (grad_gate != nullptr) {
        Vector<T, elements> first;
        Vector<T, elements> second;
        LOMEM_UNROLL
        for (int j = 0; j < elements / 2; ++j) {
          first[2 * j] = of_gate[j];
          first[2 * j + 1] = of_up[j];
          second[2 * j] = of_gate[elements / 2 + j];
          second[2 * j + 1] = of_up[elements / 2 + j];
        }
        T* pairs = grad_gate + place.row * stride + 2 * place.col;
        store_vector(pairs, first);
        store_vector(pairs + elements, second);
      }
      return;
    }
    if (grad_gate != nullptr) {
      store_vector(grad_gate + place.row * stride + place.col, of_gate);
    }
    if (grad_up != nullptr) {
      store_vector(grad_up + place.row * stride + place.col, of_up);
    }
  }

  LOMEM_HOST_DEVICE void one_by_one(const typename Grid::Place& place) const {
    for (int j = 0; j < place.count; ++j) {
      const std::int64_t i = place.row * grid.cols + place.col + j;
      T x, factor;
      reader.load_one(place, j, x, factor);
      if (output != nullptr) {
        output[i] = gated_value<Function>(x, factor);
      }
      gradients(grad_output[i], x, factor);
      const std::int64_t target = place.row * stride + (place.col + j) * (reader.interleaved ? 2 : 1);
      if (grad_gate != nullptr) {
        grad_gate[target] = x;
      }
      if (reader.interleaved ? grad_gate != nullptr : grad_up != nullptr) {
        (reader.interleaved ? grad_gate + 1 : grad_up)[target] = factor;
      }
    }
  }
};

/// Calls run(body) with the body that computes the result.
template <class Run>
auto gated_forward_by(const GatedOperands& operands, void* output, const Run& run) {
  return visit_gated(operands.activation, [&](auto function) {
    return visit_dtype(operands.dtype, [&](auto element) {
      return run(GatedForward<typename decltype(function)::type, typename decltype(element)::type>(operands, output));
    });
  });
}

/// Calls run(body) with the body that computes the gradients.
template <class Run>
auto gated_backward_by(
    const GatedOperands& operands, const void* grad_output, const GatedGradients& gradients, const Run& run) {
  return visit_gated(operands.activation, [&](auto function) {
    return visit_dtype(operands.dtype, [&](auto element) {
      return run(
          GatedBackward<typename decltype(function)::type, typename decltype(element)::type>(
              operands, grad_output, gradients));
    });
  });
}

}  // namespace lomem::cuda
