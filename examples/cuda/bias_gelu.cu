// A custom kernel with lomem's codes fused in: y = GELU(x + bias), as after a linear layer, saving 2 bits per element
// for backward. Needs only the headers of lomem::core.
//
// Like the library's own, the body is host code as well as device code: without a GPU, this program executes it on the
// CPU.
#include <lomem/cuda/step.cuh>

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <vector>

namespace cuda = lomem::cuda;

using T = lomem::bfloat16;
using Step = lomem::GELU::PublishedSteps;

/// Forward pass for n = rows * cols elements; cols must be a multiple of 8.
struct BiasGelu {
  using Unit = cuda::Unit<T, Step::bits>;  // 8 elements, 2 bytes of codes
  using Shared = cuda::Nothing;

  const T* x;
  const T* bias;
  T* y;
  std::uint8_t* codes;
  std::int64_t n;
  std::int64_t cols;

  std::int64_t blocks() const {
    const std::int64_t units = n / Unit::elements;
    return (units + cuda::threads_per_block - 1) / cuda::threads_per_block;
  }
  LOMEM_HOST_DEVICE void prepare(std::int64_t /*block*/, int /*thread*/, Shared&) const {}

  LOMEM_HOST_DEVICE void operator()(std::int64_t block, int thread, const Shared&) const {
    const std::int64_t unit = block * cuda::threads_per_block + thread;
    const std::int64_t begin = unit * Unit::elements;
    if (begin >= n) {
      return;
    }
    auto h = cuda::load_vector<Unit::elements>(x + begin);
    const auto b = cuda::load_vector<Unit::elements>(bias + begin % cols);
    cuda::Vector<T, Unit::elements> result;
    for (int j = 0; j < Unit::elements; ++j) {
      h[j] = lomem::from_compute<T>(lomem::to_compute(h[j]) + lomem::to_compute(b[j]));
      result[j] = lomem::from_compute<T>(lomem::GELU::value(lomem::to_compute(h[j])));
    }
    cuda::store_vector(y + begin, result);
    cuda::store_bytes<Unit::bytes>(codes + unit * Unit::bytes, cuda::encode<Step>(h));
  }
};

void check(cudaError_t error) {
  if (error != cudaSuccess) {
    std::fprintf(stderr, "%s\n", cudaGetErrorString(error));
    std::exit(1);
  }
}

/// Memory that the host and, if there is one, the GPU can access.
template <class Element>
Element* allocate(std::int64_t count, bool on_gpu) {
  Element* memory = nullptr;
  if (on_gpu) {
    check(cudaMallocManaged(&memory, count * sizeof(Element)));
  } else {
    memory = static_cast<Element*>(std::aligned_alloc(64, (count * sizeof(Element) + 63) / 64 * 64));
  }
  return memory;
}

template <class Body>
void run(const Body& body, bool on_gpu) {
  if (on_gpu) {
    check(cuda::launch(body, /*stream=*/nullptr));
    check(cudaDeviceSynchronize());
  } else {
    cuda::execute_on_host(body);
  }
}

int main() {
  int devices = 0;
  const bool on_gpu = cudaGetDeviceCount(&devices) == cudaSuccess && devices > 0;
  const std::int64_t rows = 1000;
  const std::int64_t cols = 768;
  const std::int64_t n = rows * cols;
  T* x = allocate<T>(n, on_gpu);
  T* bias = allocate<T>(cols, on_gpu);
  T* y = allocate<T>(n, on_gpu);
  T* grad_y = allocate<T>(n, on_gpu);
  T* grad_h = allocate<T>(n, on_gpu);
  std::uint8_t* codes = allocate<std::uint8_t>(lomem::packed_bytes(n, Step::bits), on_gpu);
  for (std::int64_t i = 0; i < n; ++i) {
    x[i] = lomem::from_compute<T>(static_cast<float>(i % 1013) / 100.0F - 5.0F);
    grad_y[i] = lomem::from_compute<T>(static_cast<float>(i % 7) - 3.0F);
  }
  for (std::int64_t j = 0; j < cols; ++j) {
    bias[j] = lomem::from_compute<T>(static_cast<float>(j % 5) / 4.0F);
  }

  run(BiasGelu{x, bias, y, codes, n, cols}, on_gpu);
  // The library's backward pass; the gradient of the bias is the sum of its result over the rows.
  double levels[Step::levels];
  for (int code = 0; code < Step::levels; ++code) {
    levels[code] = Step::level(code);
  }
  run(cuda::StepBackward<T, Step::bits>(grad_y, codes, levels, n, grad_h), on_gpu);

  double forward_error = 0;
  double gradient_error = 0;
  for (std::int64_t i = 0; i < n; ++i) {
    const T h = lomem::from_compute<T>(lomem::to_compute(x[i]) + lomem::to_compute(bias[i % cols]));
    const double value = lomem::to_compute(h);
    const double gelu = value / 2 * std::erfc(-value / std::sqrt(2.0));
    const double gradient = static_cast<double>(lomem::to_compute(grad_y[i])) * Step::level(Step::code(h));
    forward_error = std::fmax(forward_error, std::fabs(lomem::to_compute(y[i]) - gelu) / std::fmax(1, std::fabs(gelu)));
    gradient_error = std::fmax(
        gradient_error, std::fabs(lomem::to_compute(grad_h[i]) - gradient) / std::fmax(1, std::fabs(gradient)));
  }
  const bool right = forward_error < 4e-3 && gradient_error < 4e-3;
  std::printf(
      "%s it saved %lld bytes instead of %lld for backward; largest relative errors: forward %.1e, gradient %.1e "
      "(bfloat16 rounds by 3.9e-03): %s\n",
      on_gpu ? "on the GPU" : "no GPU here: on the CPU", static_cast<long long>(lomem::packed_bytes(n, Step::bits)),
      static_cast<long long>(n * sizeof(T)), forward_error, gradient_error, right ? "as it should be" : "wrong");
  return right ? 0 : 1;
}
