// How a thread treats subnormal numbers. torch.set_flush_denormal affects only the thread that calls it, not its worker
// threads.
#pragma once

#include <cstdint>

#if defined(__SSE2__)
#include <xmmintrin.h>
#endif

namespace lomem::detail {

/// The bits of the thread's control register that flush subnormal numbers to 0.
class Subnormals {
 public:
  static Subnormals kept() {
    return Subnormals(0);
  }

  static Subnormals of_this_thread() {
    return Subnormals(read() & mask);
  }

  /// Whether none are flushed.
  bool are_kept() const {
    return bits_ == 0;
  }

 private:
  friend class SubnormalsScope;

#if defined(__SSE2__)
  using Register = std::uint32_t;
  static constexpr Register mask = 0x8040;  // flush to zero, denormals are zero
  static Register read() {
    return _mm_getcsr();
  }
  static void write(Register value) {
    _mm_setcsr(value);
  }
#elif defined(__aarch64__)
  using Register = std::uint64_t;
  static constexpr Register mask = Register{1} << 24 | Register{1} << 19 | Register{1};  // FZ, FZ16, FIZ
  static Register read() {
    Register value = 0;
    asm volatile("mrs %0, fpcr" : "=r"(value));
    return value;
  }
  static void write(Register value) {
    asm volatile("msr fpcr, %0" : : "r"(value));
  }
#else
  using Register = std::uint32_t;
  static constexpr Register mask = 0;
  static Register read() {
    return 0;
  }
  static void write(Register /*value*/) {}
#endif

  explicit Subnormals(Register bits) : bits_(bits) {}

  Register bits_;
};

/// While alive, sets how this thread treats subnormal numbers. (Kernels are called through pointers, so none of their
/// arithmetic can be moved out of the scope.)
class SubnormalsScope {
 public:
  explicit SubnormalsScope(Subnormals wanted) : before_(Subnormals::read()) {
    const Subnormals::Register value = (before_ & ~Subnormals::mask) | wanted.bits_;
    changed_ = value != before_;
    if (changed_) {
      Subnormals::write(value);
    }
  }

  SubnormalsScope(const SubnormalsScope&) = delete;
  SubnormalsScope& operator=(const SubnormalsScope&) = delete;

  ~SubnormalsScope() {
    if (changed_) {
      Subnormals::write(before_);
    }
  }

 private:
  Subnormals::Register before_;
  bool changed_;
};

}  // namespace lomem::detail
