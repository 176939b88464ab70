// Memory allocator for measurements: a new CPU tensor gets the most recently freed block of its size.
#include <c10/core/Allocator.h>
#include <c10/core/CPUAllocator.h>
#include <c10/core/impl/alloc_cpu.h>
#include <pybind11/pybind11.h>

#include <cstddef>
#include <mutex>
#include <new>
#include <unordered_map>
#include <vector>

namespace lomem::detail {
namespace {

class LastFreedFirst final : public c10::Allocator {
 public:
  c10::DataPtr allocate(std::size_t bytes) override {
    const c10::Device cpu(c10::DeviceType::CPU);
    if (bytes == 0) {
      return {nullptr, cpu};
    }
    auto* block = static_cast<Header*>(take(bytes));
    if (block == nullptr) {
      block = new (c10::alloc_cpu(sizeof(Header) + bytes)) Header{bytes};
    }
    return {block + 1, block + 1, &give_back, cpu};
  }

  c10::DeleterFnPtr raw_deleter() const override {
    return &give_back;
  }

  void copy_data(void* target, const void* source, std::size_t bytes) const override {
    default_copy_data(target, source, bytes);
  }

  void release() {
    const std::lock_guard lock(mutex_);
    for (const auto& [bytes, blocks] : free_) {
      for (void* block : blocks) {
        c10::free_cpu(block);
      }
    }
    free_.clear();
  }

  /// Never destroyed: tensors may outlive the module.
  static LastFreedFirst& instance() {
    static auto* const allocator = new LastFreedFirst;
    return *allocator;
  }

 private:
  /// Precedes each block. As long as a cache line, so that blocks are aligned like torch's own.
  struct alignas(64) Header {
    std::size_t bytes;
  };

  void* take(std::size_t bytes) {
    const std::lock_guard lock(mutex_);
    const auto found = free_.find(bytes);
    if (found == free_.end() || found->second.empty()) {
      return nullptr;
    }
    void* block = found->second.back();
    found->second.pop_back();
    return block;
  }

  static void give_back(void* data) {
    if (data == nullptr) {
      return;
    }
    Header* block = static_cast<Header*>(data) - 1;
    LastFreedFirst& self = instance();
    const std::lock_guard lock(self.mutex_);
    self.free_[block->bytes].push_back(block);
  }

  std::mutex mutex_;
  std::unordered_map<std::size_t, std::vector<void*>> free_;
};

}  // namespace
}  // namespace lomem::detail

PYBIND11_MODULE(_reused_memory, m) {
  using lomem::detail::LastFreedFirst;
  m.doc() = "Memory allocator for the benchmark's tensors.";
  m.def(
      "reuse", [] { c10::SetCPUAllocator(&LastFreedFirst::instance(), /*priority=*/1); },
      "Makes new CPU tensors take the most recently freed block of their size. Nothing is returned to the system.");
  m.def(
      "release", [] { LastFreedFirst::instance().release(); }, "Returns the blocks that no tensor uses to the system.");
}
