// Classifies handwritten digits with a model that was trained in Python, converted by lomem, and compiled ahead of
// time. Evaluated, a converted model is the original: its package needs torch and nothing of lomem's.
//
//   python export_vit.py digits.pt2
//   classify_digits digits.pt2 [digits.csv]
#include <torch/csrc/inductor/aoti_package/model_package_loader.h>
#include <torch/torch.h>

#include <cstdint>
#include <cstdlib>
#include <iomanip>
#include <iostream>

#include "digits.h"

int main(int argc, char** argv) {
  if (argc < 2) {
    std::cerr << "classify_digits: got no arguments, expected classify_digits PACKAGE [digits.csv]\n";
    return EXIT_FAILURE;
  }
  const Digits digits = read_digits(argc > 2 ? argv[2] : DIGITS_CSV);
  const int64_t split = digits.labels.size(0) * 4 / 5;
  const torch::Tensor images = digits.images.slice(0, split).reshape({-1, 1, 8, 8});

  const torch::NoGradGuard no_grad;
  torch::inductor::AOTIModelPackageLoader model(argv[1]);
  const torch::Tensor logits = model.run({images}).at(0);
  const auto right = logits.argmax(1).eq(digits.labels.slice(0, split)).sum().item<int64_t>();
  std::cout << right << " of " << images.size(0) << " digits are classified correctly.\n";
  return EXIT_SUCCESS;
}
