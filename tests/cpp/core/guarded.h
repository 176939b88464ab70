// Buffers with sentinels on both sides and a chosen misalignment.
#pragma once

#include <gtest/gtest.h>

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <vector>

/// `count` elements of T that start `misalignment` elements after an aligned address, between
/// sentinel bytes that expect_intact() checks.
template <class T>
class Guarded {
 public:
  explicit Guarded(std::size_t count, std::size_t misalignment = 0)
      : count_(count),
        before_(guard + misalignment * sizeof(T)),
        bytes_(before_ + count * sizeof(T) + guard, sentinel) {}

  T* data() {
    return reinterpret_cast<T*>(bytes_.data() + before_);
  }

  std::vector<T> values() {
    std::vector<T> result(count_);
    if (count_ > 0) {
      std::memcpy(result.data(), data(), count_ * sizeof(T));
    }
    return result;
  }

  void assign(const std::vector<T>& values) {
    ASSERT_EQ(values.size(), count_);
    if (count_ > 0) {
      std::memcpy(data(), values.data(), count_ * sizeof(T));
    }
  }

  void expect_intact() const {
    for (std::size_t i = 0; i < bytes_.size(); ++i) {
      const bool inside = i >= before_ && i < before_ + count_ * sizeof(T);
      if (!inside) {
        ASSERT_EQ(bytes_[i], sentinel) << "written out of bounds, byte " << i << " of " << bytes_.size();
      }
    }
  }

 private:
  static constexpr std::size_t guard = 64;
  static constexpr std::uint8_t sentinel = 0xa5;
  std::size_t count_;
  std::size_t before_;
  std::vector<std::uint8_t> bytes_;
};
