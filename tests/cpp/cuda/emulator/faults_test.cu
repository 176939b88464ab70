// Each kernel here has one fault. The emulator reports that fault alone, and the runtime returns the error of a device.
#undef NDEBUG  // An assertion that fails is one of the faults.
#include <cuda_runtime_api.h>
#include <gtest/gtest.h>

#include <cassert>
#include <functional>
#include <set>
#include <string>
#include <vector>

#include "emulator.h"

namespace {

using emulator::Fault;

constexpr int length = 64;

// The first argument is written memory, the second one is not; `n` keeps the compiler from seeing what happens.
__global__ void fill(float* a) {
  a[blockIdx.x * blockDim.x + threadIdx.x] = 1.F;
}
__global__ void copy(const float* from, float* to) {
  to[threadIdx.x] = from[threadIdx.x];
}
__global__ void misaligned_vector(const float* a, float4* b) {
  b[threadIdx.x] = *reinterpret_cast<const float4*>(a + 1 + 4 * threadIdx.x);
}
__global__ void undefined_register(float* a) {
  float x;
  asm volatile("{ .reg .f32 nothing; mov.f32 %0, nothing; }" : "=f"(x));
  a[threadIdx.x] = x;
}
__global__ void undefined_index(float* a) {
  unsigned i;
  asm volatile("{ .reg .b32 nothing; and.b32 %0, nothing, 0; }" : "=r"(i));
  a[threadIdx.x + i] = 1.F;
}
__global__ void undefined_condition(float* a) {
  float x = 1.F;
  asm volatile("{ .reg .pred nothing; @nothing add.f32 %0, %0, %0; }" : "+f"(x));
  a[threadIdx.x] = x;
}
__global__ void race_in_block(float* a) {
  a[threadIdx.x / 2] = static_cast<float>(threadIdx.x);
}
__global__ void race_of_blocks(float* a) {
  a[threadIdx.x] = static_cast<float>(blockIdx.x);
}
__global__ void race_with_reader(float* a) {
  const float x = a[(threadIdx.x + 1) % length];
  a[threadIdx.x] = x;
}
__global__ void shared_race(float* a) {
  __shared__ float s[length];
  s[threadIdx.x] = static_cast<float>(threadIdx.x);
  a[threadIdx.x] = s[length - 1 - threadIdx.x];
}
__global__ void shared_race_of_writers(float* a) {
  __shared__ float s[length];
  s[threadIdx.x / 2] = static_cast<float>(threadIdx.x);
  s[threadIdx.x / 2 + length / 2] = static_cast<float>(threadIdx.x);
  __syncthreads();
  a[threadIdx.x] = s[threadIdx.x];
}
__global__ void shared_unwritten(float* a) {
  __shared__ float s[length];
  if (threadIdx.x < 32) {
    s[threadIdx.x] = 1.F;
  }
  __syncthreads();
  a[threadIdx.x] = s[length - 1 - threadIdx.x];
}
__global__ void shared_out_of_bounds(float* a, int n) {
  __shared__ float s[length];
  s[static_cast<int>(threadIdx.x) + n] = 1.F;
  __syncthreads();
  a[threadIdx.x] = s[threadIdx.x];
}
__global__ void local_out_of_bounds(float* a, int n) {
  float x[4] = {1, 2, 3, 4};
  for (int k = 0; k < n; ++k) {
    x[k] += a[k];
  }
  a[threadIdx.x] = x[n - 5];
}
__global__ void barrier_of_some(float* a, int n) {
  if (static_cast<int>(threadIdx.x) >= n) {
    return;
  }
  a[threadIdx.x] = 1.F;
  __syncthreads();
}
__global__ void two_barriers(float* a, int n) {
  if (static_cast<int>(threadIdx.x) < n) {
    a[threadIdx.x] = 1.F;
    __syncthreads();
  } else {
    a[threadIdx.x] = 2.F;
    __syncthreads();
    a[threadIdx.x] = 3.F;
  }
}
__global__ void shuffle_after_return(float* a, int n) {
  if (static_cast<int>(threadIdx.x) >= n) {
    return;
  }
  a[threadIdx.x] = __shfl_xor_sync(0xffffffffU, a[threadIdx.x], 1);
}
__global__ void shuffle_from_ended(float* a, int n) {
  if (static_cast<int>(threadIdx.x) >= n) {
    return;
  }
  a[threadIdx.x] = __shfl_xor_sync((1U << n) - 1, a[threadIdx.x], 16);
}
__global__ void shuffle_apart(float* a, int n) {
  float x = a[threadIdx.x];
  if (static_cast<int>(threadIdx.x) < n) {
    x += __shfl_xor_sync(0xffffffffU, x, 1);
  } else {
    x -= __shfl_xor_sync(0xffffffffU, x, 2) * 3.F;
    a[threadIdx.x + length] = x;
  }
  a[threadIdx.x] = x;
}
__global__ void shuffle_of_other_masks(float* a) {
  const unsigned mask = threadIdx.x == 0 ? 0xffffffffU : 0xfffffffeU;
  a[threadIdx.x] = __shfl_xor_sync(mask, a[threadIdx.x], 0);
}
__global__ void divide(int* a, int n) {
  a[threadIdx.x] = a[threadIdx.x] / n;
}
__global__ void assert_positive(float* a, int n) {
  assert(n > 0);
  a[threadIdx.x] = 1.F;
}
__global__ void trapped(float* a, int n) {
  if (n == 0) {
    asm volatile("trap;");
  }
  a[threadIdx.x] = 1.F;
}

__global__ void shared_before(float* a, int n) {
  __shared__ float s[length];
  s[threadIdx.x] = 1.F;
  __syncthreads();
  a[threadIdx.x] = s[static_cast<int>(threadIdx.x) - n];
}
__global__ void local_before(float* a, int n) {
  float x[4] = {1, 2, 3, 4};
  for (int k = 0; k < n; ++k) {
    x[k] += a[k];
  }
  a[threadIdx.x] = x[n - 4];
}
__global__ void local_unwritten(float* a, int n, int m) {
  float x[4];
  x[n] = a[threadIdx.x];
  a[threadIdx.x] = x[m];
}
__global__ void across_the_end(float2* a) {
  a[1] = make_float2(1, 2);
}
__global__ void undefined_in_shared(float* a) {
  __shared__ float s[length];
  float x;
  asm volatile("{ .reg .f32 nothing; mov.f32 %0, nothing; }" : "=f"(x));
  s[threadIdx.x] = x;
  __syncthreads();
  a[threadIdx.x] = s[threadIdx.x];
}
__global__ void undefined_choice(float* a) {
  float x;
  asm volatile("{ .reg .pred nothing; selp.f32 %0, 0f3F800000, 0f00000000, nothing; }" : "=f"(x));
  a[threadIdx.x] = x;
}
__global__ void undefined_lane(float* a) {
  float x;
  asm volatile("{ .reg .b32 nothing; shfl.sync.idx.b32 %0, %1, nothing, 31, -1; }" : "=f"(x) : "f"(a[threadIdx.x]));
  a[threadIdx.x] = x;
}
__global__ void write_what_another_read(float* a, float* b) {
  const float x = a[(threadIdx.x + 1) % length];
  b[threadIdx.x] = x;
  if (threadIdx.x == 0) {
    a[5] = x;
  }
}
__global__ void shared_write_what_another_read(float* a) {
  __shared__ float s[length];
  s[threadIdx.x] = 1.F;
  __syncthreads();
  const float x = s[5];
  if (threadIdx.x == length - 1) {  // the last of the readers
    s[5] = x + 1.F;
  }
  __syncthreads();
  a[threadIdx.x] = x;
}
__global__ void read_only_after_write(float* a) {
  a[threadIdx.x] = 1.F;
  float x;
  asm volatile("ld.global.nc.f32 %0, [%1];" : "=f"(x) : "l"(a + threadIdx.x) : "memory");
  a[threadIdx.x] = x + 1.F;
}
__global__ void __launch_bounds__(32) small_blocks(float* a) {
  a[threadIdx.x] = 1.F;
}
__global__ void add_one(float* a) {
  a[threadIdx.x] += 1.F;
}

struct Case {
  const char* what;
  std::set<Fault> faults;
  cudaError_t error;
  std::function<void(float*, float*)> launch;
};

int* as_int(float* a) {
  return reinterpret_cast<int*>(a);
}

std::vector<Case> cases() {
  const cudaError_t ok = cudaSuccess;
  const cudaError_t illegal = cudaErrorIllegalAddress;
  return {
      {"none", {}, ok, [](float* a, float*) { fill<<<1, length>>>(a); }},
      {"none, with several readers", {}, ok, [](float* a, float* b) { copy<<<1, length>>>(a, b); }},
      {"one element too many", {Fault::out_of_bounds}, illegal, [](float* a, float*) { fill<<<1, length + 1>>>(a); }},
      {"null", {Fault::out_of_bounds}, illegal, [](float*, float*) { fill<<<1, 1>>>(nullptr); }},
      {"memory of the host",
       {Fault::out_of_bounds},
       illegal,
       [](float*, float*) {
         static float x;
         fill<<<1, 1>>>(&x);
       }},
      {"shared memory",
       {Fault::out_of_bounds},
       illegal,
       [](float* a, float*) { shared_out_of_bounds<<<1, length>>>(a, 1); }},
      {"local memory", {Fault::out_of_bounds}, illegal, [](float* a, float*) { local_out_of_bounds<<<1, 1>>>(a, 5); }},
      {"address of a vector",
       {Fault::misaligned},
       cudaErrorMisalignedAddress,
       [](float* a, float* b) { misaligned_vector<<<1, 8>>>(a, reinterpret_cast<float4*>(b)); }},
      {"unwritten memory",
       {Fault::uninitialized, Fault::undefined_value},
       ok,
       [](float* a, float* b) { copy<<<1, 8>>>(b, a); }},
      {"unwritten shared memory",
       {Fault::undefined_value},
       ok,
       [](float* a, float*) { shared_unwritten<<<1, length>>>(a); }},
      {"register", {Fault::undefined_value}, ok, [](float* a, float*) { undefined_register<<<1, 8>>>(a); }},
      {"index", {Fault::undefined_address}, ok, [](float* a, float*) { undefined_index<<<1, 8>>>(a); }},
      {"condition", {Fault::undefined_predicate}, ok, [](float* a, float*) { undefined_condition<<<1, 8>>>(a); }},
      {"threads write the same element",
       {Fault::global_race},
       ok,
       [](float* a, float*) { race_in_block<<<1, 8>>>(a); }},
      {"blocks write the same element",
       {Fault::global_race},
       ok,
       [](float* a, float*) { race_of_blocks<<<2, length>>>(a); }},
      {"a thread reads what another writes",
       {Fault::global_race},
       ok,
       [](float* a, float*) { race_with_reader<<<1, length>>>(a); }},
      {"no barrier",
       {Fault::shared_race, Fault::undefined_value},
       ok,
       [](float* a, float*) { shared_race<<<1, length>>>(a); }},
      {"writers of shared memory",
       {Fault::shared_race},
       ok,
       [](float* a, float*) { shared_race_of_writers<<<1, length>>>(a); }},
      {"threads return before a barrier",
       {Fault::barrier_missed},
       ok,
       [](float* a, float*) { barrier_of_some<<<1, length>>>(a, 32); }},
      {"warps at two barriers",
       {Fault::barrier_places},
       ok,
       [](float* a, float*) { two_barriers<<<1, length>>>(a, 32); }},
      {"lanes at two barriers",
       {Fault::barrier_places, Fault::barrier_diverged},
       ok,
       [](float* a, float*) { two_barriers<<<1, 32>>>(a, 20); }},
      {"lanes return before a shuffle",
       {Fault::shuffle_missed},
       ok,
       [](float* a, float*) { shuffle_after_return<<<1, 32>>>(a, 20); }},
      {"shuffle from lanes that returned",
       {Fault::shuffle_source, Fault::undefined_value},
       ok,
       [](float* a, float*) { shuffle_from_ended<<<1, 32>>>(a, 20); }},
      {"shuffles in two branches",
       {Fault::shuffle_deadlock},
       cudaErrorLaunchFailure,
       [](float* a, float*) { shuffle_apart<<<1, 32>>>(a, 20); }},
      {"masks that differ", {Fault::shuffle_masks}, ok, [](float* a, float*) { shuffle_of_other_masks<<<1, 32>>>(a); }},
      {"division", {Fault::division_by_zero}, ok, [](float* a, float*) { divide<<<1, 8>>>(as_int(a), 0); }},
      {"assertion", {Fault::assertion}, cudaErrorAssert, [](float* a, float*) { assert_positive<<<1, 8>>>(a, 0); }},
      {"trap", {Fault::trap}, cudaErrorLaunchFailure, [](float* a, float*) { trapped<<<1, 8>>>(a, 0); }},
      {"the element before shared memory",
       {Fault::out_of_bounds},
       illegal,
       [](float* a, float*) { shared_before<<<1, length>>>(a, 1); }},
      {"the element before local memory",
       {Fault::out_of_bounds},
       illegal,
       [](float* a, float*) { local_before<<<1, 1>>>(a, 3); }},
      {"a vector across the end",
       {Fault::out_of_bounds},
       illegal,
       [](float*, float*) {
         float* three = nullptr;
         cudaMalloc(reinterpret_cast<void**>(&three), 3 * sizeof(float));
         across_the_end<<<1, 1>>>(reinterpret_cast<float2*>(three));
         cudaFree(three);
       }},
      {"unwritten local memory",
       {Fault::undefined_value},
       ok,
       [](float* a, float*) { local_unwritten<<<1, 8>>>(a, 2, 1); }},
      {"an undefined value through shared memory",
       {Fault::undefined_value},
       ok,
       [](float* a, float*) { undefined_in_shared<<<1, length>>>(a); }},
      {"a choice", {Fault::undefined_value}, ok, [](float* a, float*) { undefined_choice<<<1, 8>>>(a); }},
      {"a lane", {Fault::undefined_value}, ok, [](float* a, float*) { undefined_lane<<<1, 32>>>(a); }},
      {"a thread writes what another read",
       {Fault::global_race},
       ok,
       [](float* a, float* b) { write_what_another_read<<<1, length>>>(a, b); }},
      {"the last of several readers writes shared memory",
       {Fault::shared_race},
       ok,
       [](float* a, float*) { shared_write_what_another_read<<<1, length>>>(a); }},
      {"read-only memory that is written",
       {Fault::global_race},
       ok,
       [](float* a, float*) { read_only_after_write<<<1, length>>>(a); }},
      {"a block larger than the kernel's bounds",
       {},
       cudaErrorInvalidConfiguration,
       [](float* a, float*) { small_blocks<<<1, 33>>>(a); }},
      {"a block of too many threads",
       {},
       cudaErrorInvalidConfiguration,
       [](float* a, float*) { fill<<<1, 2048>>>(a); }},
      {"a grid without blocks", {}, cudaErrorInvalidConfiguration, [](float* a, float*) { fill<<<0, 1>>>(a); }},
      {"dynamic shared memory", {}, cudaErrorInvalidConfiguration, [](float* a, float*) { fill<<<1, 1, 16>>>(a); }},
  };
}

class EmulatorFaults : public testing::Test {
 protected:
  void SetUp() override {
    allocate();
  }
  void TearDown() override {
    free();
  }
  void allocate() {
    cudaMalloc(reinterpret_cast<void**>(&written_), length * sizeof(float));
    cudaMalloc(reinterpret_cast<void**>(&unwritten_), 4 * length * sizeof(float));
    cudaMemset(written_, 0, length * sizeof(float));
  }
  void free() {
    emulator::recover();
    cudaFree(written_);
    cudaFree(unwritten_);
  }
  float* written_ = nullptr;
  float* unwritten_ = nullptr;
};

TEST_F(EmulatorFaults, AreReported) {
  std::set<Fault> seen;
  for (const Case& one : cases()) {
    SCOPED_TRACE(one.what);
    free();
    allocate();
    one.launch(written_, unwritten_);
    EXPECT_EQ(cudaGetLastError(), one.error);
    // An error that a kernel leaves behind lasts, an invalid launch does not.
    EXPECT_EQ(cudaDeviceSynchronize(), one.error == cudaErrorInvalidConfiguration ? cudaSuccess : one.error);
    std::set<Fault> got;
    for (const emulator::Report& report : emulator::faults()) {
      got.insert(report.fault);
      EXPECT_NE(report.text.find("faults_test.cu:"), std::string::npos) << report.text;
    }
    EXPECT_EQ(got, one.faults);
    seen.insert(got.begin(), got.end());
  }
  for (int fault = 0; fault < static_cast<int>(Fault::count); ++fault) {
    EXPECT_EQ(seen.count(static_cast<Fault>(fault)), 1U) << "no case for: " << name_of(static_cast<Fault>(fault));
  }
}

TEST_F(EmulatorFaults, SayWhatHappenedWhere) {
  fill<<<1, length + 1>>>(written_);
  ASSERT_EQ(emulator::faults().size(), 1U);
  const std::string text = emulator::faults()[0].text;
  for (const char* part :
       {"out of bounds: ", "fill", "block 0", "store of 4 bytes by thread 64",
        "0 bytes past the end of an allocation of 256 bytes"}) {
    EXPECT_NE(text.find(part), std::string::npos) << text;
  }
}

TEST_F(EmulatorFaults, AssertionsSayWhatDoesNotHold) {
  assert_positive<<<1, 8>>>(written_, 0);
  EXPECT_NE(emulator::faults().at(0).text.find("n > 0"), std::string::npos) << emulator::faults().at(0).text;
  EXPECT_STREQ(cudaGetErrorString(cudaGetLastError()), "device-side assert triggered");
  copy<<<1, 8>>>(written_, unwritten_);
  EXPECT_EQ(cudaGetLastError(), cudaErrorAssert) << "the error lasts";
}

TEST_F(EmulatorFaults, AreCountedAndNotRepeatedWithoutEnd) {
  race_of_blocks<<<20, length>>>(written_);
  EXPECT_EQ(emulator::fault_count(), 19U * length);
  EXPECT_EQ(emulator::faults().size(), emulator::options().reports_per_instruction);
}

TEST_F(EmulatorFaults, MemsetOfTheUnwrittenByteIsNoWrite) {
  emulator::set_unwritten_byte(0xa5);
  cudaMemset(written_, 0xa5, length * sizeof(float));
  copy<<<1, 1>>>(written_, unwritten_);
  EXPECT_EQ(emulator::faults().at(0).fault, Fault::uninitialized);
  emulator::set_unwritten_byte(-1);
}

TEST_F(EmulatorFaults, LaunchesAreCounted) {
  emulator::reset_counts();
  copy<<<2, 32>>>(written_, unwritten_);
  emulator::recover();  // (both blocks write the same)
  int launched = 0;
  for (const emulator::KernelCounts& kernel : emulator::kernels()) {
    if (kernel.counts.launches == 0) {
      continue;
    }
    ++launched;
    EXPECT_NE(kernel.name.find("copy"), std::string::npos);
    EXPECT_EQ(kernel.counts.launches, 1U);
    EXPECT_EQ(kernel.counts.blocks, 2U);
    EXPECT_EQ(kernel.counts.threads, 64U);
    EXPECT_EQ(kernel.counts.loads, 2U);  // per warp
    EXPECT_EQ(kernel.counts.load_bytes, 256U);
    EXPECT_EQ(kernel.counts.load_sectors, 8U);
    EXPECT_EQ(kernel.counts.store_sectors, 8U);
  }
  EXPECT_EQ(launched, 1);
}

TEST_F(EmulatorFaults, SomeBlocksAreCountedWithSmallArraysApart) {
  const emulator::Options before = emulator::options();
  const auto small = reinterpret_cast<std::uint64_t>(unwritten_);
  emulator::options().small = {small, small + length * sizeof(float)};
  for (const bool first : {true, false}) {
    emulator::options().some_blocks = 2;
    emulator::options().first_blocks = first;
    emulator::reset_counts();
    copy<<<100, 32>>>(written_, unwritten_);
    emulator::recover();  // (the blocks write the same)
    for (const emulator::KernelCounts& kernel : emulator::kernels()) {
      if (kernel.counts.launches != 0) {
        EXPECT_EQ(kernel.counts.blocks, 100U);
        EXPECT_EQ(kernel.counts.executed_blocks, 2U);
        EXPECT_EQ(kernel.counts.load_sectors, 8U);
        EXPECT_EQ(kernel.counts.store_sectors, 0U);
        EXPECT_EQ(kernel.counts.small_sectors, 8U);
        EXPECT_EQ(kernel.counts.small_bytes, 256U);
      }
    }
  }
  emulator::options() = before;
}

TEST_F(EmulatorFaults, LaunchesInAGraphRunWhenItDoes) {
  cudaStream_t stream = nullptr;
  cudaStreamCreate(&stream);
  cudaStreamBeginCapture(stream, cudaStreamCaptureModeGlobal);
  fill<<<1, length, 0, stream>>>(written_);
  cudaGraph_t graph = nullptr;
  cudaStreamEndCapture(stream, &graph);
  EXPECT_EQ(written_[3], 0.F);
  cudaGraphExec_t executable = nullptr;
  cudaGraphInstantiate(&executable, graph, 0);
  cudaGraphDestroy(graph);
  cudaGraphLaunch(executable, stream);
  EXPECT_EQ(written_[3], 1.F);
  cudaGraphExecDestroy(executable);
  cudaStreamDestroy(stream);
}

TEST_F(EmulatorFaults, ACopyOfUnwrittenMemoryIsUnwritten) {
  cudaMemcpy(written_, unwritten_, length * sizeof(float), cudaMemcpyDeviceToDevice);
  add_one<<<1, 1>>>(written_);
  EXPECT_EQ(emulator::faults().at(0).fault, Fault::uninitialized);
}

TEST_F(EmulatorFaults, CopiesBeyondAnAllocationAreRefused) {
  const std::vector<float> values(length + 1);
  const std::size_t bytes = values.size() * sizeof(float);
  EXPECT_EQ(cudaMemcpy(written_, values.data(), bytes, cudaMemcpyHostToDevice), cudaErrorInvalidValue);
  EXPECT_EQ(cudaMemset(written_, 0, bytes), cudaErrorInvalidValue);
  EXPECT_EQ(cudaMemcpy(written_, values.data(), bytes - sizeof(float), cudaMemcpyHostToDevice), cudaSuccess);
}

TEST_F(EmulatorFaults, GraphsHoldCopiesToo) {
  cudaStream_t stream = nullptr;
  cudaStreamCreate(&stream);
  cudaStreamBeginCapture(stream, cudaStreamCaptureModeGlobal);
  cudaMemsetAsync(written_, 0, length * sizeof(float), stream);
  add_one<<<1, length, 0, stream>>>(written_);
  cudaGraph_t graph = nullptr;
  cudaStreamEndCapture(stream, &graph);
  cudaGraphExec_t executable = nullptr;
  cudaGraphInstantiate(&executable, graph, 0);
  cudaGraphLaunch(executable, stream);
  cudaGraphLaunch(executable, stream);
  float value = 0;
  cudaMemcpy(&value, written_ + 3, sizeof(value), cudaMemcpyDeviceToHost);
  EXPECT_EQ(value, 1.F);
  cudaGraphExecDestroy(executable);
  cudaGraphDestroy(graph);
  cudaStreamDestroy(stream);
}

TEST_F(EmulatorFaults, WhatMustNotHappenDuringACaptureIsRefused) {
  cudaStream_t stream = nullptr;
  cudaStreamCreate(&stream);
  cudaGraph_t graph = nullptr;
  EXPECT_EQ(cudaStreamEndCapture(stream, &graph), cudaErrorIllegalState);
  EXPECT_EQ(cudaStreamBeginCapture(nullptr, cudaStreamCaptureModeGlobal), cudaErrorStreamCaptureUnsupported);
  cudaStreamBeginCapture(stream, cudaStreamCaptureModeGlobal);
  EXPECT_EQ(cudaStreamSynchronize(stream), cudaErrorStreamCaptureUnsupported);
  EXPECT_EQ(cudaDeviceSynchronize(), cudaErrorStreamCaptureUnsupported);
  void* memory = nullptr;
  EXPECT_EQ(cudaMalloc(&memory, 4), cudaErrorStreamCaptureUnsupported);
  cudaGetLastError();
  add_one<<<1, 1>>>(written_);  // A launcher that drops its stream.
  EXPECT_EQ(cudaGetLastError(), cudaErrorStreamCaptureImplicit);
  EXPECT_EQ(cudaStreamEndCapture(stream, &graph), cudaSuccess);
  cudaGraphDestroy(graph);
  cudaStreamDestroy(stream);
}

TEST_F(EmulatorFaults, TheDefaultStreamHasOtherHandles) {
  add_one<<<1, 1, 0, cudaStreamPerThread>>>(written_);
  add_one<<<1, 1, 0, cudaStreamLegacy>>>(written_);
  EXPECT_EQ(written_[0], 2.F);
}

}  // namespace
