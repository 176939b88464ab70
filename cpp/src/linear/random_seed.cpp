#include "random_seed.h"

#include <ATen/CPUGeneratorImpl.h>
#include <ATen/Context.h>
#include <ATen/DeviceAccelerator.h>
#include <ATen/Functions.h>
#include <c10/core/InferenceMode.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <c10/core/impl/VirtualGuardImpl.h>
#include <lomem/ops.h>

#include <concepts>
#include <map>
#include <mutex>
#include <optional>
#include <utility>

#include "random_mix.h"

namespace lomem {
namespace detail {
namespace {

/// Determines seeds, together with the initial seed of torch's default CPU generator.
struct Stream {
  std::mutex mutex;
  /// Start of the stream, and number of seeds drawn since.
  uint64_t key = 0;
  uint64_t count = 0;
};

Stream& stream() {
  static Stream instance;
  return instance;
}

void begin(uint64_t key, uint64_t count = 0) {
  Stream& seeds = stream();
  const std::scoped_lock lock(seeds.mutex);
  seeds.key = key;
  seeds.count = count;
}

/// A number that identifies the current position of torch's default CPU generator.
uint64_t position_of_default_generator() {
  at::Generator generator = at::detail::getDefaultCPUGenerator();
  at::mt19937 engine;
  {
    const std::scoped_lock lock(generator.mutex());
    engine = at::check_generator<at::CPUGeneratorImpl>(generator)->engine();
  }
  const at::mt19937_data_pod data = engine.data();
  uint64_t result = mix(data.seed_);
  const auto take = [&](uint64_t word) { result = mix(result + golden_step + word); };
  take(static_cast<uint64_t>(data.left_));
  take(data.next_);
  for (const uint32_t word : data.state_) {
    take(word);
  }
  return result;
}

uint64_t next_number() {
  at::Generator generator = at::detail::getDefaultCPUGenerator();
  uint64_t torch_seed = 0;
  {
    const std::scoped_lock lock(generator.mutex());
    torch_seed = generator.current_seed();
  }
  Stream& seeds = stream();
  const std::scoped_lock lock(seeds.mutex);
  return mix(mix(mix(torch_seed + golden_step) + seeds.key) + golden_step * ++seeds.count);
}

/// One counter per device, never destroyed: its device may shut down first.
struct Counters {
  std::mutex mutex;
  std::map<std::pair<at::DeviceType, at::DeviceIndex>, at::Tensor> tensors;
};

Counters& counters() {
  static auto& instance = *new Counters;
  return instance;
}

at::Device with_index(at::Device device) {
  return device.has_index() ? device : c10::impl::VirtualGuardImpl(device.type()).getDevice();
}

at::Tensor find_counter(at::Device device) {
  Counters& known = counters();
  const std::scoped_lock lock(known.mutex);
  const auto found = known.tensors.find({device.type(), device.index()});
  return found == known.tensors.end() ? at::Tensor() : found->second;
}

/// Whether the device's current stream is capturing a graph. Unknown in versions of torch that offer no way to check.
template <class Guard>
std::optional<bool> captures(const Guard& guard, at::Device device) {
  if constexpr (requires(const c10::Stream& s) {
                  { guard.isStreamCapturing(s) } -> std::convertible_to<bool>;
                }) {
    return guard.isStreamCapturing(guard.getStream(device));
  } else {
    return std::nullopt;
  }
}

std::optional<bool> captures(at::Device device) {
  return captures(c10::impl::VirtualGuardImpl(device.type()), device);
}

bool may_be_captured(at::Device device) {
  return !device.is_cpu() && !device.is_meta();
}

/// False for devices of fake tensors, which need not exist.
bool is_in_use(at::Device device) {
  if (!at::isAccelerator(device.type())) {
    return false;
  }
  const at::AcceleratorHooksInterface& hooks = at::globalContext().getAcceleratorHooksInterface(device.type());
  return hooks.isAvailable() && hooks.hasPrimaryContext(device.index());
}

}  // namespace

void prepare_seeds(at::Device device) {
  if (!may_be_captured(device) || !is_in_use(device)) {
    return;
  }
  const at::Device place = with_index(device);
  if (find_counter(place).defined() || captures(place).value_or(false)) {
    return;
  }
  // A plain tensor on the device, even while tracing.
  const c10::InferenceMode no_inference(false);
  const c10::impl::ExcludeDispatchKeyGuard no_modes(
      c10::DispatchKeySet(
          {c10::DispatchKey::Python, c10::DispatchKey::PythonTLSSnapshot, c10::DispatchKey::Functionalize,
           c10::DispatchKey::FuncTorchDynamicLayerFrontMode, c10::DispatchKey::FuncTorchDynamicLayerBackMode}));
  const at::Tensor counter = at::zeros({}, at::TensorOptions(place).dtype(at::kLong));
  Counters& known = counters();
  const std::scoped_lock lock(known.mutex);
  known.tensors.try_emplace({place.type(), place.index()}, counter);
}

at::Tensor draw_seed(const char* op, at::Device device) {
  const auto number = static_cast<int64_t>(next_number());
  const at::TensorOptions options = at::TensorOptions(device).dtype(at::kLong);
  if (!may_be_captured(device)) {
    return at::full({}, number, options);
  }
  const at::Device place = with_index(device);
  prepare_seeds(place);
  if (captures(place) == false) {
    return at::full({}, number, options);
  }
  at::Tensor counter = find_counter(place);
  TORCH_CHECK(
      counter.defined(), op, ": ", place,
      " is capturing a graph before any seed was drawn on it, expected one run outside capture first");
  const at::Tensor seed = counter.add(number);
  counter.add_(static_cast<int64_t>(golden_step));
  return seed;
}

void begin_random_stream() {
  begin(position_of_default_generator());
}

}  // namespace detail

void manual_seed(uint64_t seed) {
  detail::begin(detail::mix(seed));
}

std::pair<uint64_t, uint64_t> random_state() {
  detail::Stream& seeds = detail::stream();
  const std::scoped_lock lock(seeds.mutex);
  return {seeds.key, seeds.count};
}

void set_random_state(std::pair<uint64_t, uint64_t> state) {
  detail::begin(state.first, state.second);
}

}  // namespace lomem
