// The step functions that the library ships, as data.
#pragma once
#include <string_view>
namespace lomem::detail {
/// Boundaries and levels of `bits` bits that minimise `criterion` ("primitive" or "derivative") of `function` on the
/// line; `error`: the L2 norm that is left.
struct StepTable {
  std::string_view function;
  std::string_view criterion;
  int bits;
  double error;
  const double* boundaries;  // 2^bits - 1
  const double* levels;      // 2^bits
};
extern const StepTable step_tables[];
extern const int step_table_count;
}  // namespace lomem::detail
