// Runs a fuzz target where there is no libFuzzer:
//     kernels_fuzz 1000          1000 pseudo-random inputs, the same ones every time
//     kernels_fuzz crash-1 ...   the inputs in these files
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <iterator>
#include <random>
#include <vector>

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size);

namespace {

int run_random_inputs(long count) {
  std::mt19937 generator(20240507);
  for (long i = 0; i < count; ++i) {
    // What an input does not say follows from what it says: a few bytes are enough.
    std::vector<std::uint8_t> input(generator() % 64);
    for (auto& byte : input) {
      byte = static_cast<std::uint8_t>(generator());
    }
    LLVMFuzzerTestOneInput(input.data(), input.size());
  }
  std::printf("%ld inputs, no difference\n", count);
  return 0;
}

}  // namespace

int main(int count, char** arguments) {
  char* end = nullptr;
  const long inputs = count == 2 ? std::strtol(arguments[1], &end, 10) : 0;
  if (inputs > 0 && *end == '\0') {
    return run_random_inputs(inputs);
  }
  for (int i = 1; i < count; ++i) {
    std::ifstream file(arguments[i], std::ios::binary);
    if (!file) {
      std::fprintf(stderr, "%s: cannot be read, expected a number of inputs or files\n", arguments[i]);
      return 1;
    }
    const std::vector<char> input{std::istreambuf_iterator<char>(file), std::istreambuf_iterator<char>()};
    LLVMFuzzerTestOneInput(reinterpret_cast<const std::uint8_t*>(input.data()), input.size());
    std::printf("%s: no difference\n", arguments[i]);
  }
  return count > 1 ? 0 : 1;
}
