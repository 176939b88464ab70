// The functions of the CUDA runtime that programs compiled by nvcc call, with the emulator in place of a device.
#include <cuda_runtime_api.h>

#include <algorithm>
#include <array>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <functional>
#include <map>
#include <memory>
#include <mutex>

#include "emulator.h"
#include "memory.h"

namespace emulator {

namespace {

// The container of compiled kernels, as nvcc lays it out (there is no public header): a header, then entries for
// architectures.
struct FatbinWrapper {
  std::uint32_t magic;
  std::uint32_t version;
  const std::uint8_t* data;
  const void* unused;
};
struct FatbinHeader {
  std::uint32_t magic;
  std::uint16_t version;
  std::uint16_t header_bytes;
  std::uint64_t bytes;  // of all entries
};
struct FatbinEntry {
  std::uint16_t kind;
  std::uint16_t version;
  std::uint32_t header_bytes;
  std::uint64_t bytes;
  std::uint32_t compressed_bytes;
  std::uint32_t options_offset;
  std::uint16_t ptx_minor;
  std::uint16_t ptx_major;
  std::uint32_t arch;
};
constexpr std::uint32_t fatbin_magic = 0xba55ed50;
constexpr std::uint16_t fatbin_ptx = 1;

/// The kernels of a source file, of which there may be versions for several architectures.
struct Image {
  const std::uint8_t* fatbin = nullptr;
  std::unique_ptr<Module> module;  // once a kernel of it was launched
};

struct Function {
  Image* image = nullptr;
  std::string name;
  Kernel* kernel = nullptr;  // once it was launched
  Counts counts;
};

struct Launch {
  Function* function = nullptr;
  unsigned blocks = 0;
  unsigned threads = 0;
  std::vector<std::uint8_t> parameters;
};

/// What a graph does, one after the other.
using Work = std::vector<std::function<cudaError_t()>>;

struct Stream {
  bool blocking = true;  // waits for the default stream, and it for this one
  std::unique_ptr<Work> captured;
};

/// The default stream, by any of its handles, is nullptr.
Stream* stream_of(const void* handle) {
  const auto number = reinterpret_cast<std::uintptr_t>(handle);
  return number > 2 ? static_cast<Stream*>(const_cast<void*>(handle)) : nullptr;  // cudaStreamLegacy, ...PerThread
}

struct Configuration {
  dim3 grid;
  dim3 block;
  std::size_t shared;
  void* stream;
};

[[noreturn]] void fail(const std::string& what) {
  std::fprintf(stderr, "emulator: %s\n", what.c_str());
  std::abort();
}

int environment(const char* name, int otherwise) {
  const char* value = std::getenv(name);
  return value != nullptr && *value != 0 ? std::atoi(value) : otherwise;
}

class Device {
 public:
  Device() {
    options().seed = static_cast<unsigned>(environment("LOMEM_EMULATOR_SEED", 1));
    options().races = environment("LOMEM_EMULATOR_RACES", 1) != 0;
    options().host_memory = environment("LOMEM_EMULATOR_HOST_MEMORY", 0) != 0;
    std::atexit(at_exit);
  }

  std::recursive_mutex mutex;
  const int arch = environment("LOMEM_EMULATOR_ARCH", 90);
  int multiprocessors = environment("LOMEM_EMULATOR_MULTIPROCESSORS", 2);
  int unwritten_byte = -1;
  int captures = 0;           // streams that capture
  int blocking_captures = 0;  // of these, that wait for the default stream
  cudaError_t last_error = cudaSuccess;
  cudaError_t lasting_error = cudaSuccess;  // After a fault, every call fails.
  std::vector<std::unique_ptr<Image>> images;
  std::map<const void*, std::unique_ptr<Function>> functions;

  cudaError_t fail_with(cudaError_t error) {
    if (error != cudaSuccess) {
      last_error = error;
    }
    return error;
  }

  /// Does something in a stream: now, or when a graph runs.
  cudaError_t enqueue(const void* stream, std::function<cudaError_t()> work) {
    Stream* s = stream_of(stream);
    if (s != nullptr && s->captured != nullptr) {
      s->captured->push_back(std::move(work));
      return cudaSuccess;
    }
    if (s == nullptr && blocking_captures > 0) {
      return fail_with(cudaErrorStreamCaptureImplicit);
    }
    return fail_with(work());
  }

  /// What a device refuses while a stream captures: to wait for it, to allocate.
  bool refuses_to_wait() {
    return captures > 0 && fail_with(cudaErrorStreamCaptureUnsupported) != cudaSuccess;
  }

  /// Loads the function's module, if there is a version of it that the device can run.
  bool load(Function& function) {
    Image& image = *function.image;
    if (image.module == nullptr) {
      const char* text = newest_ptx(image);
      if (text == nullptr) {
        return false;
      }
      image.module = std::make_unique<Module>();
      try {
        parse(text, function.name, *image.module);
      } catch (const std::exception& error) {
        fail(std::string("cannot parse PTX: ") + error.what());
      }
      const auto& files = image.module->files;
      const auto source =
          std::find_if(files.begin(), files.end(), [](const std::string& file) { return !file.empty(); });
      if (source != files.end()) {
        image.module->name = *source + ", PTX";
      }
    }
    const auto found = image.module->kernels.find(function.name);
    if (found == image.module->kernels.end()) {
      return false;
    }
    function.kernel = &found->second;
    return true;
  }

  cudaError_t run(Launch& launch) {
    if (lasting_error != cudaSuccess) {
      return lasting_error;
    }
    Function& function = *launch.function;
    switch (emulator::run(*function.kernel, launch.blocks, launch.threads, launch.parameters.data(), function.counts)) {
      case Status::ok: return cudaSuccess;
      case Status::illegal_address: return lasting_error = cudaErrorIllegalAddress;
      case Status::misaligned: return lasting_error = cudaErrorMisalignedAddress;
      case Status::assertion: return lasting_error = cudaErrorAssert;
      default: return lasting_error = cudaErrorLaunchFailure;
    }
  }

 private:
  const char* newest_ptx(const Image& image) const {
    FatbinHeader header{};
    std::memcpy(&header, image.fatbin, sizeof(header));
    if (header.magic != fatbin_magic) {
      fail("the kernels are in an unknown container");
    }
    const std::uint8_t* at = image.fatbin + header.header_bytes;
    const std::uint8_t* end = at + header.bytes;
    const char* newest = nullptr;
    int newest_arch = 0;
    while (at < end) {
      FatbinEntry entry{};
      std::memcpy(&entry, at, sizeof(entry));
      const int entry_arch = static_cast<int>(entry.arch);
      if (entry.kind == fatbin_ptx && entry_arch <= arch && entry_arch > newest_arch) {
        newest = reinterpret_cast<const char*>(at + entry.header_bytes);
        newest_arch = entry_arch;
        if (entry.compressed_bytes != 0) {
          fail("the PTX is compressed: nvcc needs -no-compress");
        }
      }
      at += entry.header_bytes + entry.bytes;
    }
    return newest;
  }

  static void at_exit();
};

// Never destroyed: other libraries unregister their kernels at exit.
Device& device() {
  static auto& instance = *new Device;
  return instance;
}

std::lock_guard<std::recursive_mutex> lock() {
  return std::lock_guard<std::recursive_mutex>(device().mutex);
}

void write_coverage(const char* path) {
  std::FILE* file = std::fopen(path, "w");
  if (file == nullptr) {
    fail(std::string("cannot write ") + path);
  }
  for (const auto& image : device().images) {
    if (image->module == nullptr) {
      continue;
    }
    for (const auto& [name, kernel] : image->module->kernels) {
      const auto executed =
          std::count_if(kernel.executed.begin(), kernel.executed.end(), [](std::uint64_t n) { return n > 0; });
      std::fprintf(file, "%td of %zu %s\n", executed, kernel.executed.size(), name.c_str());
      std::string previous;
      for (std::size_t k = 0; executed > 0 && k + 1 < kernel.code.size(); ++k) {
        const Instruction& i = kernel.code[k];
        const std::string where = name_of(*image->module, i.source);
        if (kernel.executed[k] == 0 && where != previous) {
          std::fprintf(file, "    not executed: %s, line %d of the PTX\n", where.c_str(), i.line);
          previous = where;
        }
      }
    }
  }
  std::fclose(file);
}

void Device::at_exit() {
  if (fault_count() > 0) {
    std::fprintf(stderr, "emulator: %llu faults\n", static_cast<unsigned long long>(fault_count()));
  }
  const char* path = std::getenv("LOMEM_EMULATOR_COVERAGE");
  if (path != nullptr && *path != 0) {
    write_coverage(path);
  }
}

thread_local std::vector<Configuration> configurations;

/// What a device refuses to launch. Grids of two dimensions and dynamic shared memory are not emulated.
bool can_launch(const Kernel& kernel, dim3 grid, dim3 block, std::size_t shared) {
  constexpr std::int64_t max_static_shared_bytes = 48 * 1024;
  return grid.x > 0 && grid.x <= 0x7fffffffU && grid.y == 1 && grid.z == 1 && block.x > 0 &&
         block.x <= std::min(kernel.max_threads, 1024U) && block.y == 1 && block.z == 1 && shared == 0 &&
         kernel.shared_bytes <= max_static_shared_bytes;
}

cudaError_t launch(Function* function, dim3 grid, dim3 block, void** arguments, std::size_t shared, void* stream) {
  const auto guard = lock();
  Device& d = device();
  if (d.lasting_error != cudaSuccess) {
    return d.fail_with(d.lasting_error);
  }
  if (function == nullptr) {
    return d.fail_with(cudaErrorInvalidDeviceFunction);
  }
  if (function->kernel == nullptr && !d.load(*function)) {
    return d.fail_with(cudaErrorNoKernelImageForDevice);
  }
  const Kernel& kernel = *function->kernel;
  if (!can_launch(kernel, grid, block, shared)) {
    return d.fail_with(cudaErrorInvalidConfiguration);
  }
  Launch one{function, grid.x, block.x, {}};
  one.parameters.resize(kernel.parameter_bytes);
  for (std::size_t p = 0; p < kernel.parameters.size(); ++p) {
    std::memcpy(one.parameters.data() + kernel.parameters[p].offset, arguments[p], kernel.parameters[p].size);
  }
  return d.enqueue(stream, [one = std::move(one)]() mutable { return device().run(one); });
}

Function* find_function(const void* host) {
  const auto found = device().functions.find(host);
  return found != device().functions.end() ? found->second.get() : nullptr;
}

}  // namespace

std::vector<KernelCounts> kernels() {
  const auto guard = lock();
  std::vector<KernelCounts> result;
  for (const auto& [host, function] : device().functions) {
    result.push_back({function->name, function->counts});
  }
  return result;
}

void reset_counts() {
  const auto guard = lock();
  for (const auto& [host, function] : device().functions) {
    function->counts = {};
  }
}

void set_unwritten_byte(int byte) {
  device().unwritten_byte = byte;
}

void set_multiprocessors(int count) {
  device().multiprocessors = count;
}

void recover() {
  clear_faults();
  device().last_error = device().lasting_error = cudaSuccess;
}

}  // namespace emulator

using emulator::device;

extern "C" {

/// For programs that load the emulator at run time, such as tests in Python.
unsigned long long lomem_emulator_fault_count() {
  return emulator::fault_count();
}

// Called by code that nvcc generates
// -----------------------------------------------------------------------------------

void** CUDARTAPI __cudaRegisterFatBinary(void* wrapper) {
  const auto guard = emulator::lock();
  auto image = std::make_unique<emulator::Image>();
  image->fatbin = static_cast<const emulator::FatbinWrapper*>(wrapper)->data;
  device().images.push_back(std::move(image));
  return reinterpret_cast<void**>(device().images.back().get());
}

void CUDARTAPI __cudaRegisterFatBinaryEnd(void** /*image*/) {}

void CUDARTAPI __cudaUnregisterFatBinary(void** /*image*/) {}

char CUDARTAPI __cudaInitModule(void** /*image*/) {
  return 1;
}

void CUDARTAPI __cudaRegisterFunction(
    void** image, const char* host, char* /*device_function*/, const char* name, int /*threads*/, uint3* /*tid*/,
    uint3* /*bid*/, dim3* /*block*/, dim3* /*grid*/, int* /*warp*/) {
  const auto guard = emulator::lock();
  auto function = std::make_unique<emulator::Function>();
  function->image = reinterpret_cast<emulator::Image*>(image);
  function->name = name;
  device().functions[host] = std::move(function);
}

void CUDARTAPI __cudaRegisterVar(
    void** /*image*/, char* /*host*/, char* /*device_address*/, const char* name, int /*external*/,
    std::size_t /*size*/, int /*constant*/, int /*global*/) {
  // The kernels' own uses of it work; the host's copies to it would not.
  std::fprintf(stderr, "emulator: the host cannot access variable %s\n", name);
}

unsigned CUDARTAPI __cudaPushCallConfiguration(dim3 grid, dim3 block, std::size_t shared, CUstream_st* stream) {
  emulator::configurations.push_back({grid, block, shared, stream});
  return 0;
}

cudaError_t CUDARTAPI __cudaPopCallConfiguration(dim3* grid, dim3* block, std::size_t* shared, void* stream) {
  const emulator::Configuration last = emulator::configurations.back();
  emulator::configurations.pop_back();
  *grid = last.grid;
  *block = last.block;
  *shared = last.shared;
  *static_cast<void**>(stream) = last.stream;
  return cudaSuccess;
}

cudaError_t CUDARTAPI __cudaGetKernel(cudaKernel_t* kernel, const void* host) {
  const auto guard = emulator::lock();
  *kernel = reinterpret_cast<cudaKernel_t>(emulator::find_function(host));
  return *kernel != nullptr ? cudaSuccess : device().fail_with(cudaErrorInvalidDeviceFunction);
}

cudaError_t CUDARTAPI __cudaLaunchKernel(
    cudaKernel_t kernel, dim3 grid, dim3 block, void** arguments, std::size_t shared, cudaStream_t stream) {
  return emulator::launch(reinterpret_cast<emulator::Function*>(kernel), grid, block, arguments, shared, stream);
}

cudaError_t CUDARTAPI cudaLaunchKernel(  // what nvcc calls before CUDA 13
    const void* host, dim3 grid, dim3 block, void** arguments, std::size_t shared, cudaStream_t stream) {
  return emulator::launch(emulator::find_function(host), grid, block, arguments, shared, stream);
}

// Errors --------------------------------------------------------------------------------------------------------------

cudaError_t CUDARTAPI cudaGetLastError() {
  const cudaError_t error = device().last_error;
  device().last_error = device().lasting_error;
  return error;
}

cudaError_t CUDARTAPI cudaPeekAtLastError() {
  return device().last_error;
}

const char* CUDARTAPI cudaGetErrorString(cudaError_t error) {
  switch (error) {
    case cudaSuccess: return "no error";
    case cudaErrorAssert: return "device-side assert triggered";
    case cudaErrorIllegalAddress: return "an illegal memory access was encountered";
    case cudaErrorInvalidConfiguration: return "invalid configuration argument";
    case cudaErrorMisalignedAddress: return "misaligned address";
    case cudaErrorNoKernelImageForDevice: return "no kernel image is available for execution on the device";
    default: return "an error";
  }
}

// Memory --------------------------------------------------------------------------------------------------------------

cudaError_t CUDARTAPI cudaMalloc(void** pointer, std::size_t bytes) {
  const auto guard = emulator::lock();
  *pointer = nullptr;
  if (device().refuses_to_wait()) {
    return cudaErrorStreamCaptureUnsupported;
  }
  if (bytes == 0) {
    return cudaSuccess;
  }
  constexpr std::size_t alignment = 256;  // as a device's memory, with a gap behind it
  *pointer = std::aligned_alloc(alignment, (bytes + alignment - 1) / alignment * alignment + alignment);
  if (*pointer == nullptr) {
    return device().fail_with(cudaErrorMemoryAllocation);
  }
  std::memset(*pointer, 0xcd, bytes);
  emulator::add_allocation(reinterpret_cast<std::uint64_t>(*pointer), static_cast<std::int64_t>(bytes), false);
  return cudaSuccess;
}

cudaError_t CUDARTAPI cudaFree(void* pointer) {
  const auto guard = emulator::lock();
  if (pointer == nullptr) {
    return cudaSuccess;
  }
  if (!emulator::remove_allocation(reinterpret_cast<std::uint64_t>(pointer))) {
    return device().fail_with(cudaErrorInvalidValue);
  }
  std::free(pointer);
  return cudaSuccess;
}

namespace {

/// Whether memory of the device that begins in an allocation lies in it. Memory of the host is not known here.
bool fits(const void* memory, std::size_t bytes) {
  const auto begin = reinterpret_cast<std::uint64_t>(memory);
  const emulator::Allocation* allocation = emulator::find_allocation(begin);
  return allocation == nullptr || bytes <= allocation->begin + static_cast<std::uint64_t>(allocation->size) - begin;
}

cudaError_t set_memory(void* pointer, int value, std::size_t bytes) {
  const bool known = emulator::find_allocation(reinterpret_cast<std::uint64_t>(pointer)) != nullptr;
  if (bytes > 0 && (!fits(pointer, bytes) || (!known && !emulator::options().host_memory))) {
    return cudaErrorInvalidValue;
  }
  if (bytes > 0) {
    std::memset(pointer, value, bytes);
  }
  emulator::mark_written(
      reinterpret_cast<std::uint64_t>(pointer), static_cast<std::int64_t>(bytes), value != device().unwritten_byte);
  return device().lasting_error;
}

cudaError_t copy_memory(void* target, const void* source, std::size_t bytes) {
  if (bytes > 0 && (!fits(target, bytes) || !fits(source, bytes))) {
    return cudaErrorInvalidValue;
  }
  if (bytes > 0) {
    std::memmove(target, source, bytes);
  }
  emulator::copy_written(
      reinterpret_cast<std::uint64_t>(target), reinterpret_cast<std::uint64_t>(source),
      static_cast<std::int64_t>(bytes));
  return device().lasting_error;
}

}  // namespace

cudaError_t CUDARTAPI cudaMemsetAsync(void* pointer, int value, std::size_t bytes, cudaStream_t stream) {
  const auto guard = emulator::lock();
  return device().enqueue(stream, [=] { return set_memory(pointer, value, bytes); });
}

cudaError_t CUDARTAPI cudaMemset(void* pointer, int value, std::size_t bytes) {
  return cudaMemsetAsync(pointer, value, bytes, nullptr);
}

cudaError_t CUDARTAPI
cudaMemcpyAsync(void* target, const void* source, std::size_t bytes, cudaMemcpyKind /*kind*/, cudaStream_t stream) {
  const auto guard = emulator::lock();
  return device().enqueue(stream, [=] { return copy_memory(target, source, bytes); });
}

cudaError_t CUDARTAPI cudaMemcpy(void* target, const void* source, std::size_t bytes, cudaMemcpyKind kind) {
  return cudaMemcpyAsync(target, source, bytes, kind, nullptr);
}

// Device, streams, graphs ---------------------------------------------------------------------------------------------

cudaError_t CUDARTAPI cudaDeviceSynchronize() {
  const auto guard = emulator::lock();
  if (device().refuses_to_wait()) {
    return cudaErrorStreamCaptureUnsupported;
  }
  return device().lasting_error;
}

cudaError_t CUDARTAPI cudaStreamSynchronize(cudaStream_t /*stream*/) {
  const auto guard = emulator::lock();
  if (device().refuses_to_wait()) {
    return cudaErrorStreamCaptureUnsupported;
  }
  return device().lasting_error;
}

cudaError_t CUDARTAPI cudaGetDevice(int* index) {
  *index = 0;
  return cudaSuccess;
}

cudaError_t CUDARTAPI cudaSetDevice(int index) {
  return index == 0 ? cudaSuccess : device().fail_with(cudaErrorInvalidDevice);
}

cudaError_t CUDARTAPI cudaGetDeviceCount(int* count) {
  *count = 1;
  return cudaSuccess;
}

cudaError_t CUDARTAPI cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int /*index*/) {
  switch (attribute) {
    case cudaDevAttrMultiProcessorCount: *value = device().multiprocessors; return cudaSuccess;
    case cudaDevAttrComputeCapabilityMajor: *value = device().arch / 10; return cudaSuccess;
    case cudaDevAttrComputeCapabilityMinor: *value = device().arch % 10; return cudaSuccess;
    default: return device().fail_with(cudaErrorInvalidValue);
  }
}

cudaError_t CUDARTAPI cudaStreamCreateWithFlags(cudaStream_t* stream, unsigned flags) {
  *stream = reinterpret_cast<cudaStream_t>(new emulator::Stream{flags != cudaStreamNonBlocking, nullptr});
  return cudaSuccess;
}

cudaError_t CUDARTAPI cudaStreamCreate(cudaStream_t* stream) {
  return cudaStreamCreateWithFlags(stream, 0);
}

cudaError_t CUDARTAPI cudaStreamDestroy(cudaStream_t stream) {
  delete reinterpret_cast<emulator::Stream*>(stream);
  return cudaSuccess;
}

cudaError_t CUDARTAPI cudaStreamBeginCapture(cudaStream_t stream, cudaStreamCaptureMode /*mode*/) {
  const auto guard = emulator::lock();
  emulator::Stream* s = emulator::stream_of(stream);
  if (s == nullptr) {
    return device().fail_with(cudaErrorStreamCaptureUnsupported);
  }
  if (s->captured != nullptr) {
    return device().fail_with(cudaErrorIllegalState);
  }
  s->captured = std::make_unique<emulator::Work>();
  ++device().captures;
  device().blocking_captures += s->blocking ? 1 : 0;
  return cudaSuccess;
}

cudaError_t CUDARTAPI cudaStreamEndCapture(cudaStream_t stream, cudaGraph_t* graph) {
  const auto guard = emulator::lock();
  emulator::Stream* s = emulator::stream_of(stream);
  *graph = nullptr;
  if (s == nullptr || s->captured == nullptr) {
    return device().fail_with(cudaErrorIllegalState);
  }
  --device().captures;
  device().blocking_captures -= s->blocking ? 1 : 0;
  *graph = reinterpret_cast<cudaGraph_t>(s->captured.release());
  return cudaSuccess;
}

cudaError_t CUDARTAPI
cudaGraphInstantiate(cudaGraphExec_t* executable, cudaGraph_t graph, unsigned long long /*flags*/) {
  if (graph == nullptr) {
    return device().fail_with(cudaErrorInvalidValue);
  }
  *executable = reinterpret_cast<cudaGraphExec_t>(new emulator::Work(*reinterpret_cast<emulator::Work*>(graph)));
  return cudaSuccess;
}

cudaError_t CUDARTAPI cudaGraphLaunch(cudaGraphExec_t executable, cudaStream_t /*stream*/) {
  const auto guard = emulator::lock();
  for (const auto& work : *reinterpret_cast<emulator::Work*>(executable)) {
    const cudaError_t error = work();
    if (error != cudaSuccess) {
      return device().fail_with(error);
    }
  }
  return cudaSuccess;
}

cudaError_t CUDARTAPI cudaGraphDestroy(cudaGraph_t graph) {
  delete reinterpret_cast<emulator::Work*>(graph);
  return cudaSuccess;
}

cudaError_t CUDARTAPI cudaGraphExecDestroy(cudaGraphExec_t executable) {
  delete reinterpret_cast<emulator::Work*>(executable);
  return cudaSuccess;
}

}  // extern "C"
