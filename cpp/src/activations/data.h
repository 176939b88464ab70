// The step functions that ship with the library, as data.
#pragma once
#include <string_view>
namespace lomem::detail {
/// Boundaries and levels of `bits` bits that minimize `criterion` ("primitive" or "derivative") for `function` on the
/// line; `error` is the remaining L2 norm.
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
