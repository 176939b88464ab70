// Draws masks like torch on the CPU: by torch's op, or by a kernel that draws the same in a tenth of the time.
//
// torch's builds differ in how they draw. Most take two random numbers for each element from the generator, one element
// after the other. Those with MKL take a seed for MKL's generator, on CPUs of Intel. Which one it is, and whether the
// kernel draws the same, is tried out once.
#include "draws.h"

#include <ATen/EmptyTensor.h>
#include <ATen/ops/empty.h>
#include <lomem/core/mersenne.h>
#include <lomem/core/packing.h>
#include <lomem/cpu/kernels.h>

#include <cstring>
#include <mutex>

#include "../packing/ops.h"

namespace lomem::detail {
namespace {

using MaybeGenerator = std::optional<at::Generator>;

at::Tensor draw_by_torch(at::IntArrayRef sizes, at::ScalarType dtype, double kept, const MaybeGenerator& generator) {
  // Of bytes, torch draws the same as of every dtype but float64, for which MKL's seed takes twice as many numbers.
  const bool bytes = dtype != at::kDouble;
  const at::Tensor drawn = at::empty(sizes, bytes ? at::kByte : at::kDouble).bernoulli_(kept, generator);
  return packed_mask(bytes ? drawn : drawn.to(at::kByte));
}

at::Tensor draw_by_kernel(int64_t n, double kept, const MaybeGenerator& generator) {
  auto* source = at::get_generator_or_default<at::CPUGeneratorImpl>(generator, at::detail::getDefaultCPUGenerator());
  at::Tensor mask(at::detail::empty_cpu({packed_bytes(n, 1)}, at::kByte));
  const std::lock_guard<std::mutex> lock(source->mutex_);
  at::mt19937 engine = source->engine();
  at::mt19937_data_pod data = engine.data();
  MersenneState state;
  static_assert(sizeof(state.words) == sizeof(data.state_));
  std::memcpy(state.words, data.state_.data(), sizeof(state.words));
  // One is left where the next number will take new words.
  state.next = data.left_ == 1 ? MersenneState::size : static_cast<int>(data.next_);
  cpu::bernoulli_mask(state, bernoulli_bound(kept), n, mask.mutable_data_ptr<uint8_t>());
  std::memcpy(data.state_.data(), state.words, sizeof(state.words));
  data.next_ = static_cast<uint32_t>(state.next);
  data.left_ = MersenneState::size + 1 - state.next;
  engine.set_data(data);
  source->set_engine(engine);
  return mask;
}

/// Whether the kernel draws what torch draws, and leaves the generator as torch does.
bool draws_alike(at::ScalarType dtype) {
  constexpr uint64_t seed = 20;
  for (const int64_t n : {int64_t{1}, int64_t{312}, int64_t{5003}}) {
    const at::Generator by_torch = at::detail::createCPUGenerator(seed);
    const at::Generator by_kernel = at::detail::createCPUGenerator(seed);
    for (const double kept : {0.9, 0.25}) {
      if (!draw_by_torch({n}, dtype, kept, by_torch).equal(draw_by_kernel(n, kept, by_kernel)) ||
          !by_torch.get_state().equal(by_kernel.get_state())) {
        return false;
      }
    }
  }
  return true;
}

}  // namespace

at::Tensor draw_mask(at::IntArrayRef sizes, at::ScalarType dtype, double kept, const MaybeGenerator& generator) {
  static const bool alike = draws_alike(at::kByte) && draws_alike(at::kDouble);
  return alike ? draw_by_kernel(c10::multiply_integers(sizes), kept, generator)
               : draw_by_torch(sizes, dtype, kept, generator);
}

}  // namespace lomem::detail
