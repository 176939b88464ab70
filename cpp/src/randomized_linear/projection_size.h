// Number of rows from which the weight gradient of the randomized linear layer is estimated.
#pragma once

#include <cstdint>
#include <optional>

namespace lomem::detail {

/// `dim` rows, or the fraction `ratio` of all rows; then at least `min` and at most `max`.
struct ProjectionSize {
  std::optional<int64_t> dim;
  std::optional<double> ratio;
  std::optional<int64_t> min;
  std::optional<int64_t> max;
};

}  // namespace lomem::detail
