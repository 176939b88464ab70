// How many rows the weight gradient of the randomized linear layer is estimated from.
#pragma once

#include <cstdint>
#include <optional>

namespace lomem::detail {

/// `dim`, or `ratio` of all rows; then at least `min` and at most `max`.
struct ProjectionSize {
  std::optional<int64_t> dim;
  std::optional<double> ratio;
  std::optional<int64_t> min;
  std::optional<int64_t> max;
};

}  // namespace lomem::detail
