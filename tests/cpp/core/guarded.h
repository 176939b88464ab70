// Buffers that notice what is read or written beyond them.
#pragma once

#include <gtest/gtest.h>
#include <sys/mman.h>
#include <unistd.h>

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <new>
#include <vector>

/// `count` elements of T that start `misalignment` elements after a multiple of 64 bytes, between
/// sentinel bytes that expect_intact() checks.
template <class T>
class Guarded {
 public:
  explicit Guarded(std::size_t count, std::size_t misalignment = 0)
      : count_(count), bytes_(alignment + guard + (misalignment + count) * sizeof(T) + guard, sentinel) {
    const auto address = reinterpret_cast<std::uintptr_t>(bytes_.data()) + guard;
    before_ = guard + (alignment - address % alignment) % alignment + misalignment * sizeof(T);
  }
  Guarded(Guarded&&) = default;  // the bytes stay where they are
  Guarded& operator=(Guarded&&) = default;

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
    expect_sentinels(0, before_);
    expect_sentinels(before_ + count_ * sizeof(T), bytes_.size());
  }

 private:
  static constexpr std::size_t alignment = 64;
  static constexpr std::size_t guard = 64;
  static constexpr std::uint8_t sentinel = 0xa5;

  void expect_sentinels(std::size_t begin, std::size_t end) const {
    for (std::size_t i = begin; i < end; ++i) {
      ASSERT_EQ(bytes_[i], sentinel) << "written out of bounds, byte " << i << " of " << bytes_.size();
    }
  }

  std::size_t count_;
  std::size_t before_ = 0;
  std::vector<std::uint8_t> bytes_;
};

/// Elements to read, of which the last ends where memory ends: reading on is a segmentation fault.
template <class T>
class AtPageEnd {
 public:
  explicit AtPageEnd(const std::vector<T>& values) {
    const auto page = static_cast<std::size_t>(sysconf(_SC_PAGESIZE));
    const std::size_t bytes = values.size() * sizeof(T);
    const std::size_t readable = (bytes + page - 1) / page * page;
    mapped_ = readable + page;
    pages_ = mmap(nullptr, mapped_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (pages_ == MAP_FAILED) {
      throw std::bad_alloc();
    }
    auto* end = static_cast<std::uint8_t*>(pages_) + readable;
    if (bytes > 0) {
      std::memcpy(end - bytes, values.data(), bytes);
    }
    mprotect(pages_, mapped_, PROT_READ);  // a kernel does not write its inputs
    mprotect(end, page, PROT_NONE);
    data_ = reinterpret_cast<const T*>(end - bytes);
  }
  ~AtPageEnd() {
    munmap(pages_, mapped_);
  }
  AtPageEnd(const AtPageEnd&) = delete;
  AtPageEnd& operator=(const AtPageEnd&) = delete;

  const T* data() const {
    return data_;
  }

 private:
  void* pages_;
  std::size_t mapped_;
  const T* data_;
};
