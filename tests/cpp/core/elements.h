// Elements of every dtype, random rows, and a norm's row by the definition.
#pragma once

#include <lomem/core.h>

#include <cmath>
#include <cstddef>
#include <random>
#include <vector>

#include "oracle.h"

template <class T>
struct Element;
template <>
struct Element<double> {
  static constexpr lomem::DType dtype = lomem::DType::float64;
  static double from(double x) {
    return x;
  }
};
template <>
struct Element<float> {
  static constexpr lomem::DType dtype = lomem::DType::float32;
  static float from(double x) {
    return static_cast<float>(x);
  }
};
template <>
struct Element<lomem::bfloat16> {
  static constexpr lomem::DType dtype = lomem::DType::bfloat16;
  static lomem::bfloat16 from(double x) {
    return {oracle::encode(x, oracle::bfloat16)};
  }
};
template <>
struct Element<lomem::float16> {
  static constexpr lomem::DType dtype = lomem::DType::float16;
  static lomem::float16 from(double x) {
    return {oracle::encode(x, oracle::float16)};
  }
};

template <class T>
std::vector<T> random_elements(std::size_t n, double scale, unsigned seed) {
  std::mt19937 generator(seed);
  std::normal_distribution<double> normal(0, scale);
  std::vector<T> result;
  for (std::size_t i = 0; i < n; ++i) {
    result.push_back(Element<T>::from(normal(generator)));
  }
  return result;
}

// One row by the definition, in long double.
struct Expected {
  std::vector<double> z;
  std::vector<double> grad_x;
  double rstd;
};

template <class T>
Expected expected_row(
    const T* x, const double* gamma, const double* beta, const double* grad, std::size_t cols, bool centred,
    long double eps) {
  const auto n = static_cast<long double>(cols);
  long double mean = 0;
  for (std::size_t j = 0; j < cols; ++j) {
    mean += centred ? static_cast<long double>(lomem::to_compute(x[j])) / n : 0;
  }
  long double moment = 0;
  for (std::size_t j = 0; j < cols; ++j) {
    const long double d = lomem::to_compute(x[j]) - mean;
    moment += d * d / n;
  }
  const long double rstd = 1 / std::sqrt(moment + eps);
  long double mean_g = 0;
  long double mean_gy = 0;
  std::vector<long double> y;
  for (std::size_t j = 0; j < cols; ++j) {
    y.push_back((lomem::to_compute(x[j]) - mean) * rstd);
    mean_g += centred ? grad[j] * gamma[j] / n : 0;
    mean_gy += static_cast<long double>(grad[j]) * gamma[j] * y[j] / n;
  }
  Expected result;
  result.rstd = static_cast<double>(rstd);
  for (std::size_t j = 0; j < cols; ++j) {
    result.z.push_back(static_cast<double>(y[j] * gamma[j] + beta[j]));
    result.grad_x.push_back(static_cast<double>(rstd * (grad[j] * gamma[j] - mean_g - y[j] * mean_gy)));
  }
  return result;
}

/// Spacing of T at 1.
template <class T>
double spacing() {
  switch (Element<T>::dtype) {
    case lomem::DType::float64: return std::ldexp(1, -52);
    case lomem::DType::float32: return std::ldexp(1, -23);
    case lomem::DType::bfloat16: return std::ldexp(1, -7);
    default: return std::ldexp(1, -10);
  }
}
