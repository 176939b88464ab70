// What the tests that run on a device share: memory, streams, and every device.
#pragma once

#include <cuda_runtime_api.h>
#include <gtest/gtest.h>

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>
#include <vector>

inline void check(cudaError_t error) {
  ASSERT_EQ(error, cudaSuccess) << cudaGetErrorString(error);
}

/// `count` elements on the device, `misalignment` elements after an aligned address, between
/// sentinel bytes.
template <class T>
class DeviceBuffer {
 public:
  explicit DeviceBuffer(std::size_t count, std::size_t misalignment = 0)
      : count_(count), before_(guard + misalignment * sizeof(T)), bytes_(before_ + count * sizeof(T) + guard) {
    check(cudaMalloc(&memory_, bytes_));
    check(cudaMemset(memory_, sentinel, bytes_));
  }
  DeviceBuffer(const DeviceBuffer&) = delete;
  DeviceBuffer& operator=(const DeviceBuffer&) = delete;
  ~DeviceBuffer() {
    cudaFree(memory_);
  }

  T* data() const {
    return reinterpret_cast<T*>(static_cast<std::uint8_t*>(memory_) + before_);
  }
  void assign(const std::vector<T>& values) {
    ASSERT_EQ(values.size(), count_);
    check(cudaMemcpy(data(), values.data(), count_ * sizeof(T), cudaMemcpyHostToDevice));
  }
  /// Overwrites the elements, so that the next launch has to write them.
  void poison() const {
    check(cudaMemset(data(), sentinel, count_ * sizeof(T)));
  }
  /// The elements, after checking the sentinels. Waits for the device.
  std::vector<T> values() const {
    check(cudaDeviceSynchronize());
    std::vector<std::uint8_t> bytes(bytes_);
    check(cudaMemcpy(bytes.data(), memory_, bytes_, cudaMemcpyDeviceToHost));
    for (std::size_t i = 0; i < bytes_; ++i) {
      if (i < before_ || i >= before_ + count_ * sizeof(T)) {
        EXPECT_EQ(bytes[i], sentinel) << "written out of bounds, byte " << i << " of " << bytes_;
      }
    }
    std::vector<T> result(count_);
    if (count_ > 0) {
      std::memcpy(result.data(), bytes.data() + before_, count_ * sizeof(T));
    }
    return result;
  }

 private:
  static constexpr std::size_t guard = 256;
  static constexpr std::uint8_t sentinel = 0xa5;
  std::size_t count_;
  std::size_t before_;
  std::size_t bytes_;
  void* memory_ = nullptr;
};

/// Runs `launch(stream)` on the default stream, on a side stream, and captured in a graph; each time
/// after `poison()`, which overwrites the results of the time before.
inline void on_all_streams(
    const std::function<cudaError_t(cudaStream_t)>& launch, const std::function<void()>& poison,
    const std::function<void()>& verify) {
  const auto prepare = [&] {
    poison();
    check(cudaDeviceSynchronize());
  };
  prepare();
  check(launch(nullptr));
  verify();

  cudaStream_t stream = nullptr;
  check(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking));
  prepare();
  check(launch(stream));
  verify();

  cudaGraph_t graph = nullptr;
  cudaGraphExec_t executable = nullptr;
  check(cudaStreamBeginCapture(stream, cudaStreamCaptureModeGlobal));
  check(launch(stream));
  check(cudaStreamEndCapture(stream, &graph));
  check(cudaGraphInstantiate(&executable, graph, 0));
  for (int replay = 0; replay < 2; ++replay) {
    prepare();
    check(cudaGraphLaunch(executable, stream));
    verify();
  }
  check(cudaGraphExecDestroy(executable));
  check(cudaGraphDestroy(graph));
  check(cudaStreamDestroy(stream));
}

inline std::vector<std::int64_t> sizes() {
  return {0, 1, 2, 3, 4, 5, 7, 8, 9, 31, 255, 256, 1023, 2047, 2048, 2049, 4095, 4096, 4097, 8193, 100003};
}

template <class T>
std::vector<std::uint8_t> bytes_of(const std::vector<T>& values) {
  std::vector<std::uint8_t> result(values.size() * sizeof(T));
  if (!values.empty()) {
    std::memcpy(result.data(), values.data(), result.size());
  }
  return result;
}

class EveryDevice : public testing::Test {
 protected:
  /// Runs the test on each device.
  static void on_every_device(const std::function<void()>& test) {
    int devices = 0;
    check(cudaGetDeviceCount(&devices));
    ASSERT_GT(devices, 0);
    for (int device = 0; device < devices; ++device) {
      SCOPED_TRACE(device);
      check(cudaSetDevice(device));
      test();
    }
    check(cudaSetDevice(0));
  }
};
