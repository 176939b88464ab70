// Norms: bodies of CUDA kernels, for groups of threads that process a row together.
//
// The code for a row is written once, as phases between which the group adds up the results of its threads (see
// group.cuh). On the device each thread runs the phases with its state in registers; on the host, for tests, one thread
// runs each phase for all threads of the group.
//
// Arithmetic is in C: float, or double if any array is float64. The dtypes of the arrays are run-time values: branching
// on them is uniform across a grid and cheap compared to the memory access, and one kernel serves every combination of
// dtypes.
#pragma once

#include <lomem/core/norm.h>
#include <lomem/cuda/group.cuh>
#include <lomem/cuda/launch.cuh>
#include <lomem/cuda/vector.cuh>

#include <cstdint>

namespace lomem::cuda {

/// How the elements of a row are distributed over a group of up to `max_threads`: in vectors of `width` elements, where
/// vector k of thread t is vector k * threads + t of the row. The number of columns is a multiple of `width`. A thread
/// keeps `vectors` vectors in registers or, if vectors = 0, none: it then reads the row again in each phase.
template <class C_, int width_, int vectors_, int max_threads_ = max_block_threads>
struct Tiling {
  using C = C_;
  static constexpr int width = width_;
  static constexpr int vectors = vectors_;
  static constexpr bool in_registers = vectors > 0;
  static constexpr int elements = in_registers ? width * vectors : width;
  static constexpr int max_threads = max_threads_;
  static constexpr bool by_warps = max_threads == warp_size;
};

/// Which elements of a row belong to which thread.
struct Place {
  std::int64_t row;
  std::int64_t cols;
  int thread;
  int threads;

  LOMEM_HOST_DEVICE std::int64_t column(std::int64_t k, int width) const {
    return (k * threads + thread) * width;
  }
  LOMEM_HOST_DEVICE std::int64_t offset(std::int64_t k, int width) const {
    return row * cols + column(k, width);
  }
};

namespace detail {

/// Calls visitor(Type<T>{}) with the element type of `dtype`. float64 does not occur with float arithmetic: see
/// plan_forward and plan_backward.
template <class C, class Visitor>
LOMEM_HOST_DEVICE constexpr void visit_element_type(DType dtype, Visitor&& visitor) {
  if constexpr (sizeof(C) == sizeof(double)) {
    if (dtype == DType::float64) {
      visitor(Type<double>{});
      return;
    }
  }
  switch (dtype) {
    case DType::float32: visitor(Type<float>{}); break;
    case DType::bfloat16: visitor(Type<bfloat16>{}); break;
    default: visitor(Type<float16>{}); break;
  }
}

template <class T, class C>
LOMEM_HOST_DEVICE T round_to(C x) {
  if constexpr (sizeof(C) == sizeof(double)) {
    return from_double<T>(x);
  } else {
    return from_compute<T>(x);
  }
}

template <class C, int width>
LOMEM_HOST_DEVICE void load(const Array& array, std::int64_t offset, C* values) {
  visit_element_type<C>(array.dtype, [&](auto element) {
    using T = typename decltype(element)::type;
    const auto vector = load_vector<width>(static_cast<const T*>(array.data) + offset);
    for (int j = 0; j < width; ++j) {
      values[j] = static_cast<C>(to_compute(vector[j]));
    }
  });
}

template <class C, int width>
LOMEM_HOST_DEVICE void store(const MutableArray& array, std::int64_t offset, const C* values) {
  visit_element_type<C>(array.dtype, [&](auto element) {
    using T = typename decltype(element)::type;
    Vector<T, width> vector;
    for (int j = 0; j < width; ++j) {
      vector[j] = round_to<T>(values[j]);
    }
    store_vector(static_cast<T*>(array.data) + offset, vector);
  });
}

/// Loads all vectors of a thread, so that the loads are in flight together. Elements beyond the row are 0.
template <class Tiling>
LOMEM_HOST_DEVICE void load_row(const Array& array, const Place& place, typename Tiling::C* values) {
  using C = typename Tiling::C;
  constexpr int width = Tiling::width;
  visit_element_type<C>(array.dtype, [&](auto element) {
    using T = typename decltype(element)::type;
    Vector<T, width> vectors[Tiling::vectors] = {};
    for (int k = 0; k < Tiling::vectors; ++k) {
      if (place.column(k, width) < place.cols) {
        vectors[k] = load_vector<width>(static_cast<const T*>(array.data) + place.offset(k, width));
      }
    }
    for (int k = 0; k < Tiling::vectors; ++k) {
      for (int j = 0; j < width; ++j) {
        values[k * width + j] = static_cast<C>(to_compute(vectors[k][j]));
      }
    }
  });
}

/// Loads all vectors of a thread from two arrays. If both have the same dtype, their loads are in flight together.
template <class Tiling>
LOMEM_HOST_DEVICE void load_rows(
    const Array& a, const Array& b, const Place& place, typename Tiling::C* a_values, typename Tiling::C* b_values) {
  using C = typename Tiling::C;
  constexpr int width = Tiling::width;
  if (a.dtype != b.dtype) {
    load_row<Tiling>(a, place, a_values);
    load_row<Tiling>(b, place, b_values);
    return;
  }
  visit_element_type<C>(a.dtype, [&](auto element) {
    using T = typename decltype(element)::type;
    Vector<T, width> a_vectors[Tiling::vectors] = {};
    Vector<T, width> b_vectors[Tiling::vectors] = {};
    for (int k = 0; k < Tiling::vectors; ++k) {
      if (place.column(k, width) < place.cols) {
        a_vectors[k] = load_vector<width>(static_cast<const T*>(a.data) + place.offset(k, width));
        b_vectors[k] = load_vector<width>(static_cast<const T*>(b.data) + place.offset(k, width));
      }
    }
    for (int k = 0; k < Tiling::vectors; ++k) {
      for (int j = 0; j < width; ++j) {
        a_values[k * width + j] = static_cast<C>(to_compute(a_vectors[k][j]));
        b_values[k * width + j] = static_cast<C>(to_compute(b_vectors[k][j]));
      }
    }
  });
}

/// Calls visit(k, index of the vector in the thread's registers) for the vectors of a thread.
template <class Tiling, class Visitor>
LOMEM_HOST_DEVICE void for_each_vector(const Place& place, Visitor&& visit) {
  constexpr int width = Tiling::width;
  if constexpr (Tiling::in_registers) {
    for (int k = 0; k < Tiling::vectors; ++k) {
      if (place.column(k, width) < place.cols) {
        visit(std::int64_t{k}, k * width);
      }
    }
  } else {
    for (std::int64_t k = 0; place.column(k, width) < place.cols; ++k) {
      visit(k, 0);
    }
  }
}

/// Compensated (Kahan) sum, so that a thread may add thousands of terms.
template <class C>
struct LongSum {
  C sum = 0;
  C lost = 0;

  LOMEM_HOST_DEVICE void add(C x) {
    const C term = x - lost;
    const C next = sum + term;
    lost = (next - sum) - term;
    sum = next;
  }
};

template <class C, int width>
LOMEM_HOST_DEVICE C sum_of(const C* values) {
  C sum = 0;
  for (int j = 0; j < width; ++j) {
    sum += values[j];
  }
  return sum;
}

/// The biases of `count` columns, or sums for their gradients. A norm without bias keeps nothing, so that it takes no
/// registers; its biases read as 0.
template <Norm norm, class C, int count>
struct Biases {
  C values[count];

  LOMEM_HOST_DEVICE C operator[](int j) const {
    return values[j];
  }
  LOMEM_HOST_DEVICE void set(int j, C x) {
    values[j] = x;
  }
  LOMEM_HOST_DEVICE void add(int j, C x) {
    values[j] += x;
  }
};

template <class C, int count>
struct Biases<Norm::rms, C, count> {
  LOMEM_HOST_DEVICE C operator[](int /*j*/) const {
    return 0;
  }
  LOMEM_HOST_DEVICE void set(int /*j*/, C /*x*/) {}
  LOMEM_HOST_DEVICE void add(int /*j*/, C /*x*/) {}
};

/// Weight and bias of a few columns; 1 and 0 if absent.
template <Norm norm, class C, int width>
struct Affine {
  C gamma[width];
  Biases<norm, C, width> beta = {};

  LOMEM_HOST_DEVICE Affine(const Array& weight, const Array& bias, std::int64_t column) {
    for (int j = 0; j < width; ++j) {
      gamma[j] = 1;
    }
    if (weight.data != nullptr) {
      load<C, width>(weight, column, gamma);
    }
    if constexpr (has_bias(norm)) {
      if (bias.data != nullptr) {
        load<C, width>(bias, column, beta.values);
      }
    }
  }
};

/// Whether there is anything to load for Affine.
template <Norm norm, class Args>
LOMEM_HOST_DEVICE bool is_affine(const Args& args) {
  return args.weight.data != nullptr || (has_bias(norm) && args.bias.data != nullptr);
}

template <class C>
LOMEM_HOST_DEVICE C load_scalar(const Array& array, std::int64_t index) {
  return array.dtype == DType::float64 ? static_cast<C>(static_cast<const double*>(array.data)[index])
                                       : static_cast<C>(static_cast<const float*>(array.data)[index]);
}

template <class C>
LOMEM_HOST_DEVICE void store_scalar(const MutableArray& array, std::int64_t index, C value) {
  if (array.dtype == DType::float64) {
    static_cast<double*>(array.data)[index] = value;
  } else {
    static_cast<float*>(array.data)[index] = static_cast<float>(value);
  }
}

}  // namespace detail

/// What a thread keeps for a row in the forward pass.
template <class Tiling>
struct NormForwardState {
  typename Tiling::C x[Tiling::elements];
};

/// Processes one row in the forward pass.
template <Norm norm, class Tiling, class Group>
LOMEM_HOST_DEVICE void norm_forward_row(const NormForward& args, std::int64_t row, Group& group) {
  using C = typename Tiling::C;
  using State = NormForwardState<Tiling>;
  constexpr int width = Tiling::width;
  const C n = static_cast<C>(args.cols > 0 ? args.cols : 1);
  const auto place = [&](int thread) { return Place{row, args.cols, thread, group.threads}; };
  const auto reload = [&](const Place& p, std::int64_t k, State& state) {
    if constexpr (!Tiling::in_registers) {
      detail::load<C, width>(args.input, p.offset(k, width), state.x);
    }
  };

  if constexpr (Tiling::in_registers) {
    group.each([&](int thread, State& state) { detail::load_row<Tiling>(args.input, place(thread), state.x); });
  }
  C mean = 0;
  if constexpr (norm == Norm::layer) {
    const Sums<C, 1> total = group.template sum<1>([&](int thread, State& state) {
      const Place p = place(thread);
      detail::LongSum<C> sum;
      if constexpr (Tiling::in_registers) {
        sum.sum = detail::sum_of<C, Tiling::elements>(state.x);
      } else {
        detail::for_each_vector<Tiling>(p, [&](std::int64_t k, int) {
          reload(p, k, state);
          sum.add(detail::sum_of<C, width>(state.x));
        });
      }
      return Sums<C, 1>{{sum.sum}};
    });
    mean = total[0] / n;
  }

  // Sums of the squared differences from the mean and, for LayerNorm, of the differences.
  constexpr int moments = norm == Norm::layer ? 2 : 1;
  const auto spread = group.template sum<moments>([&](int thread, State& state) {
    const Place p = place(thread);
    detail::LongSum<C> sum;
    detail::LongSum<C> squares;
    detail::for_each_vector<Tiling>(p, [&](std::int64_t k, int at) {
      reload(p, k, state);
      C part = 0;
      C part_squares = 0;
      for (int j = at; j < at + width; ++j) {
        state.x[j] -= mean;
        part += state.x[j];
        part_squares += state.x[j] * state.x[j];
      }
      if constexpr (Tiling::in_registers) {
        sum.sum += part;
        squares.sum += part_squares;
      } else {
        sum.add(part);
        squares.add(part_squares);
      }
    });
    if constexpr (norm == Norm::layer) {
      return Sums<C, 2>{{squares.sum, sum.sum}};
    } else {
      return Sums<C, 1>{{squares.sum}};
    }
  });
  C moment = spread[0] / n;
  // The rounding error of the mean. It is subtracted from small numbers, so none of its digits are lost.
  C rest = 0;
  if constexpr (norm == Norm::layer) {
    moment = norm_variance(spread[0], spread[1], n);
    rest = spread[1] / n;
  }
  const C rstd = norm_rstd(moment, static_cast<C>(args.eps));

  group.each([&](int thread, State& state) {
    const Place p = place(thread);
    detail::for_each_vector<Tiling>(p, [&](std::int64_t k, int at) {
      reload(p, k, state);
      C* y = state.x + at;
      for (int j = 0; j < width; ++j) {
        y[j] = norm_value(Tiling::in_registers ? y[j] : y[j] - mean, rest, rstd);
      }
      if (detail::is_affine<norm>(args)) {
        const detail::Affine<norm, C, width> affine(args.weight, args.bias, p.column(k, width));
        for (int j = 0; j < width; ++j) {
          y[j] = norm_affine(y[j], affine.gamma[j], affine.beta[j]);
        }
      }
      detail::store<C, width>(args.output, p.offset(k, width), y);
    });
    if (thread == 0) {
      detail::store_scalar(args.rstd, row, rstd);
    }
  });
}

/// Forward pass over rows.
template <Norm norm, class Tiling>
struct NormForwardRows {
  using C = typename Tiling::C;
  using State = NormForwardState<Tiling>;
  static constexpr bool by_warps = Tiling::by_warps;
  static constexpr bool by_blocks = !by_warps;

  NormForward args;

  template <class Group>
  LOMEM_HOST_DEVICE void operator()(std::int64_t row, Group& group) const {
    norm_forward_row<norm, Tiling>(args, row, group);
  }
};

namespace detail {

/// What is needed to recover y from z in a few columns.
template <Norm norm, class C, int width>
struct Recovery {
  Affine<norm, C, width> affine;
  C inverse[width];

  LOMEM_HOST_DEVICE Recovery(const NormBackward& args, std::int64_t column) : affine(args.weight, args.bias, column) {
    const C smallest = static_cast<C>(smallest_normal(args.output.dtype));
    for (int j = 0; j < width; ++j) {
      inverse[j] = norm_inverse(affine.gamma[j], smallest);
    }
  }
};

}  // namespace detail

/// What a thread keeps for a row in the backward pass and, with `parameters`, for its columns over all rows.
template <Norm norm, class Tiling, bool parameters>
struct NormBackwardState {
  using C = typename Tiling::C;
  static constexpr int columns = parameters ? Tiling::elements : 1;
  C g[Tiling::elements];
  C y[Tiling::elements];
  C gamma[columns];
  detail::Biases<norm, C, columns> beta;
  C inverse[columns];
  C grad_weight[columns] = {};
  detail::Biases<norm, C, columns> grad_bias = {};
};

/// Processes one row in the backward pass. With `parameters`, which requires rows in registers, adds the row's
/// contribution to the weight and bias gradients to the state.
template <Norm norm, class Tiling, bool parameters, class Group>
LOMEM_HOST_DEVICE void norm_backward_row(const NormBackward& args, std::int64_t row, Group& group) {
  static_assert(!parameters || Tiling::in_registers);
  using C = typename Tiling::C;
  using State = NormBackwardState<norm, Tiling, parameters>;
  constexpr int width = Tiling::width;
  const C n = static_cast<C>(args.cols);
  const auto place = [&](int thread) { return Place{row, args.cols, thread, group.threads}; };
  const bool affine = detail::is_affine<norm>(args);
  // Loaded early, so that it has arrived when it is needed.
  const C rstd = detail::load_scalar<C>(args.rstd, row);
  // Turns grad_z and z of a vector into g = gamma * grad_z and y.
  const auto recover = [&](const Place& p, std::int64_t k, int at, State& state) {
    if constexpr (parameters) {
      for (int j = at; j < at + width; ++j) {
        const C grad = state.g[j];
        state.y[j] = norm_recover(state.y[j], state.inverse[j], state.beta[j]);
        state.g[j] = grad * state.gamma[j];
        state.grad_weight[j] += grad * state.y[j];
        state.grad_bias.add(j, grad);
      }
    } else if (affine) {
      const detail::Recovery<norm, C, width> recovery(args, p.column(k, width));
      for (int j = 0; j < width; ++j) {
        state.y[at + j] = norm_recover(state.y[at + j], recovery.inverse[j], recovery.affine.beta[j]);
        state.g[at + j] *= recovery.affine.gamma[j];
      }
    }
  };
  const auto reload = [&](const Place& p, std::int64_t k, State& state) {
    if constexpr (!Tiling::in_registers) {
      detail::load<C, width>(args.grad_output, p.offset(k, width), state.g);
      detail::load<C, width>(args.output, p.offset(k, width), state.y);
      recover(p, k, 0, state);
    }
  };

  // Sums of g * y and, for LayerNorm, of g.
  constexpr int means = norm == Norm::layer ? 2 : 1;
  const auto total = group.template sum<means>([&](int thread, State& state) {
    const Place p = place(thread);
    if constexpr (Tiling::in_registers) {
      detail::load_rows<Tiling>(args.grad_output, args.output, p, state.g, state.y);
    }
    detail::LongSum<C> sum;
    detail::LongSum<C> products;
    detail::for_each_vector<Tiling>(p, [&](std::int64_t k, int at) {
      if constexpr (Tiling::in_registers) {
        recover(p, k, at, state);
      } else {
        reload(p, k, state);
      }
      C part = 0;
      C part_products = 0;
      for (int j = at; j < at + width; ++j) {
        part += state.g[j];
        part_products += state.g[j] * state.y[j];
      }
      if constexpr (Tiling::in_registers) {
        sum.sum += part;
        products.sum += part_products;
      } else {
        sum.add(part);
        products.add(part_products);
      }
    });
    if constexpr (norm == Norm::layer) {
      return Sums<C, 2>{{products.sum, sum.sum}};
    } else {
      return Sums<C, 1>{{products.sum}};
    }
  });
  if (args.grad_input.data == nullptr) {
    return;
  }
  const C mean_gy = total[0] / n;
  const C mean_g = norm == Norm::layer ? total[means - 1] / n : C(0);

  group.each([&](int thread, State& state) {
    const Place p = place(thread);
    detail::for_each_vector<Tiling>(p, [&](std::int64_t k, int at) {
      reload(p, k, state);
      for (int j = at; j < at + width; ++j) {
        state.g[j] = norm_gradient(state.g[j], state.y[j], rstd, mean_g, mean_gy);
      }
      detail::store<C, width>(args.grad_input, p.offset(k, width), state.g + at);
    });
  });
}

/// Backward pass over rows, without the sums for weight and bias.
template <Norm norm, class Tiling>
struct NormBackwardRows {
  using C = typename Tiling::C;
  using State = NormBackwardState<norm, Tiling, false>;
  static constexpr bool by_warps = Tiling::by_warps;
  static constexpr bool by_blocks = !by_warps;

  NormBackward args;

  template <class Group>
  LOMEM_HOST_DEVICE void operator()(std::int64_t row, Group& group) const {
    norm_backward_row<norm, Tiling, false>(args, row, group);
  }
};

/// Sums over rows for the gradients of weight and bias, stage 1 of 2: partial sums over strips of rows, each with
/// `cols` elements of C. Stage 2 adds the strips in order, so the result does not depend on how threads are scheduled.
template <class C>
struct StripSums {
  C* grad_weight = nullptr;  // (strips, cols), or null
  C* grad_bias = nullptr;
  std::int64_t strips = 0;
};

/// Strip s consists of rows [begin(s), begin(s + 1)).
LOMEM_HOST_DEVICE constexpr std::int64_t strip_begin(std::int64_t strip, std::int64_t strips, std::int64_t rows) {
  // Avoids the product strip * rows, which may overflow.
  return strip * (rows / strips) + (strip < rows % strips ? strip : rows % strips);
}

namespace detail {

/// Stores a few columns of a strip's sums. The workspace is aligned, and cols is a multiple of `width`.
template <int width, Norm norm, class C, int count>
LOMEM_HOST_DEVICE void store_sums(
    const StripSums<C>& sums, std::int64_t offset, const C* grad_weight, const Biases<norm, C, count>& grad_bias,
    int at) {
  Vector<C, width> vector;
  if (sums.grad_weight != nullptr) {
    for (int j = 0; j < width; ++j) {
      vector[j] = grad_weight[at + j];
    }
    store_vector(sums.grad_weight + offset, vector);
  }
  if (has_bias(norm) && sums.grad_bias != nullptr) {
    for (int j = 0; j < width; ++j) {
      vector[j] = grad_bias[at + j];
    }
    store_vector(sums.grad_bias + offset, vector);
  }
}

}  // namespace detail

/// Backward pass over strips of rows: gradients of the input and the strips' sums, in one pass.
template <Norm norm, class Tiling>
struct NormBackwardStrips {
  using C = typename Tiling::C;
  using State = NormBackwardState<norm, Tiling, true>;
  static constexpr bool by_warps = Tiling::by_warps;
  static constexpr bool by_blocks = !by_warps;

  NormBackward args;
  std::int64_t rows;
  StripSums<C> sums;

  template <class Group>
  LOMEM_HOST_DEVICE void operator()(std::int64_t strip, Group& group) const {
    constexpr int width = Tiling::width;
    // A thread works on the same columns in all rows.
    group.each([&](int thread, State& state) {
      const Place p{strip, args.cols, thread, group.threads};
      detail::for_each_vector<Tiling>(p, [&](std::int64_t k, int at) {
        const detail::Recovery<norm, C, width> recovery(args, p.column(k, width));
        for (int j = 0; j < width; ++j) {
          state.gamma[at + j] = recovery.affine.gamma[j];
          state.beta.set(at + j, recovery.affine.beta[j]);
          state.inverse[at + j] = recovery.inverse[j];
        }
      });
    });
    const std::int64_t end = strip_begin(strip + 1, sums.strips, rows);
    for (std::int64_t row = strip_begin(strip, sums.strips, rows); row < end; ++row) {
      norm_backward_row<norm, Tiling, true>(args, row, group);
    }
    group.each([&](int thread, State& state) {
      const Place p{strip, args.cols, thread, group.threads};
      detail::for_each_vector<Tiling>(p, [&](std::int64_t k, int at) {
        detail::store_sums<width>(sums, p.offset(k, width), state.grad_weight, state.grad_bias, at);
      });
    });
  }
};

/// Stage 1 for rows that do not fit in registers: a body (see launch.cuh) that reads the rows once more. A thread sums
/// `width` columns of one strip.
template <Norm norm, class C, int width>
struct StripSumsBody {
  using Shared = Nothing;

  NormBackward args;
  std::int64_t rows;
  StripSums<C> sums;

  LOMEM_HOST_DEVICE std::int64_t blocks_per_strip() const {
    return (args.cols / width + threads_per_block - 1) / threads_per_block;
  }
  std::int64_t blocks() const {
    return blocks_per_strip() * sums.strips;
  }
  LOMEM_HOST_DEVICE void prepare(std::int64_t /*block*/, int /*thread*/, Shared&) const {}

  LOMEM_HOST_DEVICE void operator()(std::int64_t block, int thread, const Shared&) const {
    const std::int64_t strip = block / blocks_per_strip();
    const std::int64_t column = (block % blocks_per_strip() * threads_per_block + thread) * width;
    if (column >= args.cols) {
      return;
    }
    const detail::Recovery<norm, C, width> recovery(args, column);
    C grad_weight[width] = {};
    detail::Biases<norm, C, width> grad_bias = {};
    const std::int64_t end = strip_begin(strip + 1, sums.strips, rows);
    for (std::int64_t row = strip_begin(strip, sums.strips, rows); row < end; ++row) {
      C grad[width];
      C z[width];
      detail::load<C, width>(args.grad_output, row * args.cols + column, grad);
      detail::load<C, width>(args.output, row * args.cols + column, z);
      for (int j = 0; j < width; ++j) {
        grad_weight[j] += grad[j] * norm_recover(z[j], recovery.inverse[j], recovery.affine.beta[j]);
        grad_bias.add(j, grad[j]);
      }
    }
    detail::store_sums<width>(sums, strip * args.cols + column, grad_weight, grad_bias, 0);
  }
};

/// Stage 2: a body that adds the strips of each column in a fixed order and rounds the result.
template <class C>
struct AddStripsBody {
  static constexpr int columns = 8;
  static constexpr int parts = threads_per_block / columns;
  struct Shared {
    C sums[parts][columns];
  };

  const C* strip_sums;  // (strips, cols)
  std::int64_t strips;
  std::int64_t cols;
  MutableArray result;

  std::int64_t blocks() const {
    return (cols + columns - 1) / columns;
  }
  /// Part p of the threads adds strips p, p + parts, ... of eight columns.
  LOMEM_HOST_DEVICE void prepare(std::int64_t block, int thread, Shared& shared) const {
    const std::int64_t column = block * columns + thread % columns;
    C sum = 0;
    if (column < cols) {
      for (std::int64_t strip = thread / columns; strip < strips; strip += parts) {
        sum += strip_sums[strip * cols + column];
      }
    }
    shared.sums[thread / columns][thread % columns] = sum;
  }
  LOMEM_HOST_DEVICE void operator()(std::int64_t block, int thread, const Shared& shared) const {
    const std::int64_t column = block * columns + thread;
    if (thread >= columns || column >= cols) {
      return;
    }
    C sum = 0;
    for (int part = 0; part < parts; ++part) {
      sum += shared.sums[part][thread];
    }
    detail::visit_element_type<double>(result.dtype, [&](auto element) {
      using T = typename decltype(element)::type;
      static_cast<T*>(result.data)[column] = from_double<T>(static_cast<double>(sum));
    });
  }
};

}  // namespace lomem::cuda
