// The handwritten digits of examples/data.
#pragma once

#include <torch/torch.h>

#include <cstdint>
#include <cstdlib>
#include <fstream>
#include <iostream>
#include <sstream>
#include <string>
#include <vector>

struct Digits {
  torch::Tensor images;  // (n, 64) in [0, 1]
  torch::Tensor labels;  // (n)
};

/// Reads rows of 64 pixels (0 to 16) and a label.
inline Digits read_digits(const std::string& path) {
  std::ifstream file(path);
  if (!file) {
    std::cerr << "cannot open " << path << "\n";
    std::exit(1);
  }
  std::vector<float> pixels;
  std::vector<int64_t> labels;
  std::string line;
  while (std::getline(file, line)) {
    if (line.empty() || line[0] == '#') {
      continue;
    }
    std::stringstream fields(line);
    std::string field;
    std::vector<float> row;
    while (std::getline(fields, field, ',')) {
      row.push_back(std::stof(field));
    }
    if (row.size() != 65) {
      std::cerr << "a line of " << path << " has " << row.size() << " fields, expected 65\n";
      std::exit(1);
    }
    labels.push_back(static_cast<int64_t>(row.back()));
    pixels.insert(pixels.end(), row.begin(), row.end() - 1);
  }
  const auto n = static_cast<int64_t>(labels.size());
  return {torch::tensor(pixels).reshape({n, 64}) / 16, torch::tensor(labels)};
}
