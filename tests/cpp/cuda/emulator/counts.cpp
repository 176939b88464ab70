// What every kernel costs per element of a tensor of 64M elements on a GPU with 132 multiprocessors: a few blocks of
// each grid are executed on the emulator, and what they did is scaled to the grid. Prints JSON, for
// benchmarks/cuda_counts.py, with these figures for each call of a launcher:
//
//   elements            of the tensors
//   ideal               bytes per element that the op has to move: each of its arguments once
//   loaded, stored      bytes per element that the threads ask for
//   moved               bytes per element of the sectors (32 bytes) that the warps ask for
//   small               the same, of weight, bias, their gradients and the workspace. These are small and come from
//                       caches, so they are not in the three figures above.
//   instructions        of PTX per element
//   active_lanes        of 32, in the mean of these instructions
//   conversions, divisions, special_functions, shuffles      of PTX per element, among the instructions
//   wavefronts          per access to shared memory; 1 if there are no bank conflicts; absent if there are no accesses
//   kernels             mangled names
//
// Caches do not exist here: bytes that a warp reads twice count twice.
#include <lomem/cuda/kernels.h>
#include <lomem/cuda/norm_plan.h>
#include <sys/mman.h>
#include <unistd.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <map>
#include <numeric>
#include <random>
#include <string>

#include "../../core/drawn_cases.h"
#include "../../core/elements.h"
#include "../../core/fused_functions.h"
#include "../../core/gates.h"
#include "emulator.h"

namespace {

using lomem::Array;
using lomem::DType;
using lomem::MutableArray;
using lomem::Norm;
using namespace lomem::cuda;

constexpr std::int64_t tensor_elements = std::int64_t{1} << 26;
constexpr int multiprocessors = 132;  // an H100's or H200's
constexpr int sector_bytes = 32;

[[noreturn]] void fail(const std::string& what) {
  std::fprintf(stderr, "counts: %s\n", what.c_str());
  std::exit(1);
}

// Memory --------------------------------------------------------------------------------------------------------------
//
// The emulator knows nothing of it (Options::host_memory), so pages that no kernel touches cost nothing.

class Mapping {
 public:
  explicit Mapping(std::size_t bytes) : bytes_(bytes) {
    constexpr int flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE;
    data_ = static_cast<std::uint8_t*>(mmap(nullptr, bytes_, PROT_READ | PROT_WRITE, flags, -1, 0));
    if (data_ == MAP_FAILED) {
      fail("cannot reserve memory");
    }
  }
  /// Repeats the contents of `file`, which has `period` bytes.
  Mapping(std::size_t bytes, int file, std::size_t period) : Mapping((bytes / period + 1) * period) {
    for (std::size_t at = 0; at < bytes_; at += period) {
      if (mmap(data_ + at, period, PROT_READ, MAP_SHARED | MAP_FIXED, file, 0) == MAP_FAILED) {
        fail("cannot map a file of random numbers");
      }
    }
  }
  Mapping(const Mapping&) = delete;
  Mapping& operator=(const Mapping&) = delete;
  ~Mapping() {
    munmap(data_, bytes_);
  }

  std::uint8_t* data() const {
    return data_;
  }
  std::size_t size() const {
    return bytes_;
  }

 private:
  std::size_t bytes_;
  std::uint8_t* data_ = nullptr;
};

/// Approximately N(0, 1), and the same with every standard library.
double normal(std::mt19937& random) {
  double sum = -6;
  for (int k = 0; k < 12; ++k) {
    sum += static_cast<double>(random()) / 0x1p32;
  }
  return sum;
}

constexpr std::size_t period = std::size_t{1} << 20;

/// An array of 64M elements and a few more that repeats a file of `period` bytes.
std::uint8_t* repeated(const std::vector<std::uint8_t>& contents, std::size_t element_bytes) {
  const int file = memfd_create("lomem", 0);
  if (file < 0 || write(file, contents.data(), period) != static_cast<ssize_t>(period)) {
    fail("cannot write a file in memory");
  }
  auto* mapping = new Mapping((tensor_elements + 64) * element_bytes, file, period);  // for the whole run
  close(file);
  return mapping->data();
}

/// A tensor of normal numbers: the same one for each dtype and `which`.
std::uint8_t* normal_numbers(DType dtype, int which = 0) {
  static std::map<std::pair<DType, int>, std::uint8_t*> made;
  std::uint8_t*& data = made[{dtype, which}];
  if (data == nullptr) {
    std::mt19937 random(which + 1);
    std::vector<std::uint8_t> contents(period);
    lomem::visit_dtype(dtype, [&](auto type) {
      using T = typename decltype(type)::type;
      for (std::size_t at = 0; at < period; at += sizeof(T)) {
        const T x = Element<T>::from(normal(random));
        std::memcpy(&contents[at], &x, sizeof(T));
      }
    });
    data = repeated(contents, lomem::element_size(dtype));
  }
  return data;
}

/// Random bytes below 2^bits.
std::uint8_t* random_bytes(int bits = 8) {
  static std::map<int, std::uint8_t*> made;
  std::uint8_t*& data = made[bits];
  if (data == nullptr) {
    std::mt19937 random(1);
    std::vector<std::uint8_t> contents(period);
    for (std::uint8_t& byte : contents) {
      byte = static_cast<std::uint8_t>(random() & ((1U << bits) - 1));
    }
    data = repeated(contents, 1);
  }
  return data;
}

/// Where small arrays are: see Options::small.
class SmallMemory {
 public:
  SmallMemory() : mapping_(std::size_t{1} << 30) {
    const auto begin = reinterpret_cast<std::uint64_t>(mapping_.data());
    emulator::options().small = {begin, begin + mapping_.size()};
  }
  void* take(std::size_t bytes) {
    void* result = mapping_.data() + used_;
    used_ += (bytes + 255) / 256 * 256;
    if (used_ > mapping_.size()) {
      fail("the small arrays are too large");
    }
    return result;
  }
  /// Normal numbers.
  Array parameter(DType dtype, std::int64_t size) {
    const std::size_t bytes = size * lomem::element_size(dtype);
    return {std::memcpy(take(bytes), normal_numbers(dtype), bytes), dtype};
  }

 private:
  Mapping mapping_;
  std::size_t used_ = 0;
};

// Counting ------------------------------------------------------------------------------------------------------------

/// Prints what a launch cost. `ideal` is in bytes, of the whole call.
void count(
    const std::string& name, std::int64_t elements, std::int64_t ideal, unsigned executed_blocks,
    const std::function<cudaError_t()>& launch) {
  static bool first = true;
  emulator::options().some_blocks = executed_blocks;
  emulator::reset_counts();
  if (launch() != cudaSuccess || emulator::fault_count() != 0) {
    fail(name + ": a kernel failed");
  }
  const auto n = static_cast<double>(elements);
  double loaded = 0, stored = 0, moved = 0, small = 0, warp_instructions = 0, thread_instructions = 0;
  double conversions = 0, divisions = 0, special_functions = 0, shuffles = 0, shared = 0, wavefronts = 0;
  std::string kernels;
  for (const emulator::KernelCounts& kernel : emulator::kernels()) {
    const emulator::Counts& c = kernel.counts;
    if (c.launches == 0) {
      continue;
    }
    kernels += (kernels.empty() ? "\"" : ", \"") + kernel.name + '"';
    const double grid = static_cast<double>(c.blocks) / static_cast<double>(c.executed_blocks);
    const auto add = [&](double& sum, std::uint64_t number) { sum += grid * static_cast<double>(number); };
    add(loaded, c.load_bytes);
    add(stored, c.store_bytes);
    add(moved, sector_bytes * (c.load_sectors + c.store_sectors));
    add(small, sector_bytes * c.small_sectors);
    add(warp_instructions, c.warp_instructions);
    add(thread_instructions, c.thread_instructions);
    add(conversions, c.conversions);
    add(divisions, c.divisions);
    add(special_functions, c.special_functions);
    add(shuffles, c.shuffles);
    add(shared, c.shared_accesses);
    add(wavefronts, c.shared_wavefronts);
  }
  std::printf("%s\n  {\"case\": \"%s\", \"elements\": %lld", first ? "" : ",", name.c_str(), (long long)elements);
  first = false;
  const auto figure = [](const char* key, double value) { std::printf(", \"%s\": %.9g", key, value); };
  figure("ideal", static_cast<double>(ideal) / n);
  figure("loaded", loaded / n);
  figure("stored", stored / n);
  figure("moved", moved / n);
  figure("small", small / n);
  // A warp's instruction is one of each of its 32 elements, whether or not all lanes take part.
  figure("instructions", 32 * warp_instructions / n);
  figure("active_lanes", thread_instructions / warp_instructions);
  figure("conversions", 32 * conversions / n);
  figure("divisions", 32 * divisions / n);
  figure("special_functions", 32 * special_functions / n);
  figure("shuffles", 32 * shuffles / n);
  if (shared > 0) {
    figure("wavefronts", wavefronts / shared);
  }
  std::printf(", \"kernels\": [%s]}", kernels.c_str());
  std::fflush(stdout);
}

const char* name_of(DType dtype) {
  switch (dtype) {
    case DType::float64: return "f64";
    case DType::float32: return "f32";
    case DType::bfloat16: return "bf16";
    default: return "f16";
  }
}

constexpr DType dtypes[] = {DType::float64, DType::float32, DType::bfloat16, DType::float16};

// Activations and packing ---------------------------------------------------------------------------------------------

void count_activations(DType dtype, int bits, bool misaligned) {
  constexpr std::int64_t n = tensor_elements;
  const auto size = static_cast<std::int64_t>(lomem::element_size(dtype));
  const std::int64_t code_bytes = lomem::packed_bytes(n, bits);
  const std::string end = std::string(" ") + name_of(dtype) + " " + std::to_string(bits) +
                          (bits == 1 ? " bit" : " bits") + (misaligned ? " misaligned" : "");
  // Boundaries that split the inputs about evenly, and levels other than 0: the look-ups are as random as the inputs.
  std::vector<double> boundaries;
  std::vector<double> levels(std::size_t{1} << bits);
  for (int k = 1; k < 1 << bits; ++k) {
    const double p = static_cast<double>(k) / (1 << bits);
    boundaries.push_back(std::log(p / (1 - p)) / 1.702);
  }
  for (std::size_t k = 0; k < levels.size(); ++k) {
    levels[k] = static_cast<double>(k + 1);
  }
  const Mapping results((n + 64) * size);
  const std::int64_t offset = misaligned ? size : 0;
  const std::uint8_t* input = normal_numbers(dtype) + offset;
  count("step_encode" + end, n, n * size + code_bytes, 2, [&] {
    return step_encode(dtype, input, n, boundaries.data(), bits, results.data() + offset, nullptr);
  });
  count("step_backward" + end, n, 2 * n * size + code_bytes, 2, [&] {
    return step_backward(dtype, input, random_bytes(), levels.data(), bits, n, results.data() + offset, nullptr);
  });
  if (bits == 1) {
    count(
        std::string("band_encode ") + name_of(dtype) + (misaligned ? " misaligned" : ""), n, n * size + code_bytes, 2,
        [&] { return band_encode(dtype, input, n, -1, 1, results.data() + offset, nullptr); });
  }
}

void count_dropout(DType dtype, bool misaligned) {
  constexpr std::int64_t n = tensor_elements;
  const auto size = static_cast<std::int64_t>(lomem::element_size(dtype));
  const std::string end = std::string(" ") + name_of(dtype) + (misaligned ? " misaligned" : "");
  const Mapping results((n + 64) * size);
  const std::int64_t offset = misaligned ? size : 0;
  const std::uint8_t* input = normal_numbers(dtype) + offset;
  count("mask_multiply" + end, n, 2 * n * size + n / 8, 2, [&] {
    return mask_multiply(dtype, input, random_bytes(), 2, n, results.data() + offset, nullptr);
  });
  count("seed_multiply" + end, n, 2 * n * size, 2, [&] {
    return seed_multiply(
        dtype, input, reinterpret_cast<const std::int64_t*>(random_bytes()), 1u << 31, 2, n, results.data() + offset,
        nullptr);
  });
}

void count_storage(DType dtype, int bits, bool misaligned) {
  constexpr std::int64_t n = tensor_elements;
  const lomem::GroupFormat format{bits, 128};
  const auto size = static_cast<std::int64_t>(lomem::element_size(dtype));
  const std::int64_t bytes = n * size + n * bits / 8 + 2 * n / format.group;
  const std::string end =
      std::string(" ") + name_of(dtype) + " " + std::to_string(bits) + " bits" + (misaligned ? " misaligned" : "");
  const std::int64_t offset = misaligned ? size : 0;
  const Mapping results((n + 64) * size);
  const Mapping scales(2 * n / format.group);
  auto* factors = reinterpret_cast<lomem::bfloat16*>(scales.data());
  const std::uint8_t* input = normal_numbers(dtype) + offset;
  const auto* seed = reinterpret_cast<const std::int64_t*>(random_bytes());
  count("group_encode nearest" + end, n, bytes, 2, [&] {
    return group_encode(dtype, input, n, format, nullptr, 0, results.data(), factors, nullptr);
  });
  count("group_encode stochastic" + end, n, bytes, 2, [&] {
    return group_encode(dtype, input, n, format, seed, 1, results.data(), factors, nullptr);
  });
  count("group_decode" + end, n, bytes, 2, [&] {
    return group_decode(dtype, random_bytes(), factors, n, format, nullptr, 0, results.data() + offset, nullptr);
  });
  count("group_decode dithered" + end, n, bytes, 2, [&] {
    return group_decode(dtype, random_bytes(), factors, n, format, seed, 1, results.data() + offset, nullptr);
  });
}

void count_drawn(DType dtype, int bits, bool misaligned) {
  constexpr std::int64_t n = tensor_elements;
  const auto size = static_cast<std::int64_t>(lomem::element_size(dtype));
  const std::int64_t code_bytes = lomem::packed_bytes(n, bits);
  const std::string end = std::string(" ") + name_of(dtype) + " " + std::to_string(bits) +
                          (bits == 1 ? " bit" : " bits") + (misaligned ? " misaligned" : "");
  const Mapping results((n + 64) * size);
  const std::int64_t offset = misaligned ? size : 0;
  const std::uint8_t* input = normal_numbers(dtype) + offset;
  const auto* seed = reinterpret_cast<const std::int64_t*>(random_bytes());
  const lomem::DrawnTable table = drawn::waves().table;
  count("drawn_encode" + end, n, n * size + code_bytes, 2, [&] {
    return drawn_encode(dtype, table, input, n, bits, seed, 1, results.data() + offset, nullptr);
  });
  count("drawn_backward" + end, n, 2 * n * size + code_bytes, 2, [&] {
    return drawn_backward(
        dtype, input, random_bytes(), {-0.125, 0.25}, bits, n, seed, 1, results.data() + offset, nullptr);
  });
  if (bits == 4 && !misaligned) {
    count("drawn_encode slow" + end, n, n * size + code_bytes, 2, [&] {
      return drawn_encode(dtype, drawn::slow().table, input, n, bits, seed, 1, results.data(), nullptr);
    });
  }
}

void count_forward(DType dtype, bool misaligned) {
  constexpr std::int64_t n = tensor_elements;
  const auto size = static_cast<std::int64_t>(lomem::element_size(dtype));
  const std::int64_t offset = misaligned ? size : 0;
  const Mapping output((n + 64) * size);
  const Mapping codes(n);
  FusedFunctions::for_each([&](auto type) {
    using Function = typename decltype(type)::type;
    const std::string name = std::string("step_forward ") + Fused<Function>::name + " " + name_of(dtype);
    const std::int64_t code_bytes = lomem::packed_bytes(n, Function::PublishedSteps::bits);
    count(name + (misaligned ? " misaligned" : ""), n, 2 * n * size + code_bytes, 2, [&] {
      return step_forward<Function>(
          dtype, normal_numbers(dtype) + offset, n, output.data() + offset, codes.data(), nullptr);
    });
  });
}

/// Of one array that holds both operands, in rows of a common size; with the result again in the backward pass.
void count_gated(DType dtype, Operands form, bool misaligned) {
  constexpr std::int64_t n = tensor_elements / 2;
  constexpr std::int64_t cols = 8192;
  constexpr const char* names[] = {"silu", "gelu", "gelu_tanh", "relu", "sigmoid"};
  constexpr const char* forms[] = {"", " halves", " pairs"};
  const auto size = static_cast<std::int64_t>(lomem::element_size(dtype));
  const std::int64_t offset = misaligned ? size : 0;
  const Mapping output((n + 64) * size);
  const Mapping gradients((2 * n + 64) * size);
  lomem::visit_dtype(dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    const auto* both = reinterpret_cast<const T*>(normal_numbers(dtype) + offset);
    auto* results = reinterpret_cast<T*>(gradients.data() + offset);
    for (const lomem::GatedActivation activation : gates) {
      if (form != Operands::apart && activation != lomem::GatedActivation::silu) {
        continue;
      }
      const std::int64_t rows = form == Operands::apart ? 1 : n / cols;
      const auto operands = operands_in(form, activation, both, rows, n / rows);
      const std::string end = std::string(" ") + names[static_cast<int>(activation)] + " " + name_of(dtype) +
                              forms[static_cast<int>(form)] + (misaligned ? " misaligned" : "");
      count("gated_forward" + end, n, 3 * n * size, 2, [&] {
        return gated_forward(operands, output.data() + offset, nullptr);
      });
      const auto* grad = normal_numbers(dtype, 1) + offset;
      count("gated_backward" + end, n, 5 * n * size, 2, [&] {
        return gated_backward(operands, grad, gradients_in<T>(form, results, rows, n / rows, nullptr), nullptr);
      });
      count("gated_backward with output" + end, n, 6 * n * size, 2, [&] {
        return gated_backward(
            operands, grad, gradients_in(form, results, rows, n / rows, reinterpret_cast<T*>(output.data() + offset)),
            nullptr);
      });
    }
  });
}

void count_packing(int bits, bool misaligned) {
  constexpr std::int64_t n = tensor_elements;
  const std::string end =
      std::string(" ") + std::to_string(bits) + (bits == 1 ? " bit" : " bits") + (misaligned ? " misaligned" : "");
  const std::int64_t ideal = n + lomem::packed_bytes(n, bits);
  const Mapping results(n + 64);
  const int offset = misaligned ? 1 : 0;
  count("pack_bits" + end, n, ideal, 2, [&] {
    return pack_bits(random_bytes(bits) + offset, n, bits, results.data(), nullptr);
  });
  count("unpack_bits" + end, n, ideal, 2, [&] {
    return unpack_bits(random_bytes(), n, bits, results.data() + offset, nullptr);
  });
}

// Norms ---------------------------------------------------------------------------------------------------------------

struct NormCase {
  DType dtype;
  std::int64_t cols;
  bool affine;
  DType weight;
  bool misaligned;
};

std::string describe(const NormCase& c) {
  return std::string(name_of(c.dtype)) + (c.affine ? " affine" : " plain") +
         (c.affine && c.weight != c.dtype ? std::string(" of ") + name_of(c.weight) : "") + " " +
         std::to_string(c.cols) + (c.misaligned ? " misaligned" : "");
}

template <Norm norm>
void count_norm(const NormCase& c) {
  constexpr bool layer = norm == Norm::layer;
  const auto size = static_cast<std::int64_t>(lomem::element_size(c.dtype));
  const std::int64_t offset = c.misaligned ? size : 0;
  const DType statistics = c.dtype == DType::float64 ? DType::float64 : DType::float32;
  const Mapping result((tensor_elements + 64) * size);
  const Mapping rstd(tensor_elements / c.cols * sizeof(double) + 64);
  SmallMemory small;

  lomem::NormBackward backward;
  backward.grad_output = {normal_numbers(c.dtype) + offset, c.dtype};
  backward.output = {normal_numbers(c.dtype, 1) + offset, c.dtype};
  backward.grad_input = {result.data() + offset, c.dtype};
  backward.rstd = {normal_numbers(statistics), statistics};
  backward.cols = c.cols;
  lomem::NormForward forward;
  forward.input = backward.output;
  forward.output = backward.grad_input;
  forward.rstd = {rstd.data(), statistics};
  forward.cols = c.cols;
  forward.eps = 1e-5;
  NormParameterGradients parameters;
  std::int64_t parameter_bytes = 0;
  const auto take = [&](Array& parameter, MutableArray& gradient) {
    parameter = small.parameter(c.weight, c.cols);
    const auto bytes = static_cast<std::int64_t>(c.cols * lomem::element_size(c.weight));
    gradient = {small.take(bytes), c.weight};
    parameter_bytes += bytes;
  };
  if (c.affine) {
    take(forward.weight, parameters.grad_weight);
    backward.weight = forward.weight;
    if (layer) {
      take(forward.bias, parameters.grad_bias);
      backward.bias = forward.bias;
    }
  }
  // As many rows as give every strip, and every block of warps, the same number: then one block is like another.
  constexpr std::int64_t rows_per_block = 4;  // of warps_kernel
  std::int64_t rows = tensor_elements / c.cols;
  const NormPlan plan = plan_backward(backward, c.affine);
  const std::int64_t strips = plan_strips(plan, rows, c.cols, multiprocessors);
  rows -= rows % std::lcm(strips, rows_per_block);
  parameters.workspace = small.take(norm_backward_workspace(backward, rows, parameters));

  const std::string name = std::string(layer ? "layer_norm" : "rms_norm");
  const std::int64_t n = rows * c.cols;
  const std::int64_t row_bytes = rows * static_cast<std::int64_t>(lomem::element_size(statistics));
  // Rows may begin anywhere in a sector, and come around after 16 of them. A strip of columns may be narrower than the
  // block that sums it: all of a row are executed.
  const std::int64_t columns = std::int64_t{plan.width} * threads_per_block;
  const bool unlike = c.cols * size % sector_bytes != 0;
  const bool narrow = c.affine && !plan.parameters && c.cols % columns != 0;
  const auto blocks = static_cast<unsigned>(unlike ? 16 : narrow ? (c.cols + columns - 1) / columns : 1);
  count(name + " forward " + describe(c), n, 2 * n * size + row_bytes + parameter_bytes, blocks, [&] {
    return norm_forward<norm>(forward, rows, nullptr);
  });
  count(name + " backward " + describe(c), n, 3 * n * size + row_bytes + 2 * parameter_bytes, blocks, [&] {
    return norm_backward<norm>(backward, rows, parameters, nullptr);
  });
}

void count_norms(const NormCase& c) {
  count_norm<Norm::layer>(c);
  count_norm<Norm::rms>(c);
}

void count_norms(DType dtype, std::initializer_list<std::int64_t> columns, bool misaligned = false) {
  for (const std::int64_t cols : columns) {
    for (const bool affine : {false, true}) {
      count_norms({dtype, cols, affine, dtype, misaligned});
    }
  }
}

}  // namespace

int main() {
  emulator::options().host_memory = true;
  emulator::options().first_blocks = true;
  emulator::set_multiprocessors(multiprocessors);
  std::printf("{\"multiprocessors\": %d, \"cases\": [", multiprocessors);
  for (const DType dtype : dtypes) {
    count_forward(dtype, false);
    for (int bits = 1; bits <= 8; ++bits) {
      count_activations(dtype, bits, false);
    }
  }
  count_forward(DType::bfloat16, true);
  for (const int bits : {1, 2, 4}) {
    count_activations(DType::bfloat16, bits, true);
  }
  for (const DType dtype : dtypes) {
    for (int bits = 1; bits <= 8; ++bits) {
      count_drawn(dtype, bits, false);
    }
  }
  count_drawn(DType::bfloat16, 4, true);
  for (const DType dtype : dtypes) {
    count_dropout(dtype, false);
  }
  count_dropout(DType::bfloat16, true);
  for (const DType dtype : dtypes) {
    count_storage(dtype, 8, false);
    count_storage(dtype, 4, false);
  }
  count_storage(DType::bfloat16, 8, true);
  for (const DType dtype : dtypes) {
    count_gated(dtype, Operands::apart, false);
  }
  count_gated(DType::bfloat16, Operands::halves, false);
  count_gated(DType::bfloat16, Operands::pairs, false);
  count_gated(DType::bfloat16, Operands::apart, true);
  for (int bits = 1; bits <= 8; ++bits) {
    count_packing(bits, false);
  }
  count_packing(2, true);
  for (const DType dtype : {DType::float32, DType::bfloat16}) {
    count_norms(dtype, {256, 512, 768, 1024, 2048, 4096, 5120, 8192, 16384, 32768});
    count_norms(dtype, {1023, 4095});
    count_norms(dtype, {1024}, true);
  }
  count_norms(DType::float16, {1024, 8192});
  count_norms(DType::float64, {512, 1024, 8192});
  // Rows for which there are kernels of their own.
  count_norms(DType::bfloat16, {255, 16385});
  count_norms(DType::float64, {255, 1023});
  for (const std::int64_t cols : {1024, 4096, 8192}) {
    count_norms({DType::bfloat16, cols, true, DType::float32, false});
  }
  std::printf("\n]}\n");
}
