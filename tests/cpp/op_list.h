// The library's list of ops, cpp/src/ops.def, as tests go through it.
#pragma once

#include <ATen/core/dispatch/Dispatcher.h>

#include <set>
#include <string>

namespace op_list {

/// See ops.def.
enum Traits : unsigned {
  none = 0,
  kernels = 1,
  composite = 2,
  not_differentiable = 4,
  keeps_dtype = 8,
  strided = 16,
  random = 32,
};

struct Entry {
  std::string name;  // with the namespace
  unsigned traits;

  bool has(Traits trait) const {
    return (traits & trait) != 0;
  }
  c10::OperatorHandle handle() const {
    return c10::Dispatcher::singleton().findSchemaOrThrow(name.c_str(), "");
  }
};

inline const Entry entries[] = {
#define LOMEM_OP(name, traits, ...) {"lomem::" #name, traits},
#include "../../cpp/src/ops.def"
#undef LOMEM_OP
};

/// The names of the ops of lomem that torch's dispatcher has.
inline std::set<std::string> registered() {
  std::set<std::string> names;
  for (const auto& op : c10::Dispatcher::singleton().getAllOpNames()) {
    if (op.name.rfind("lomem::", 0) == 0) {
      names.insert(op.name);
    }
  }
  return names;
}

inline std::set<std::string> names() {
  std::set<std::string> result;
  for (const Entry& entry : entries) {
    result.insert(entry.name);
  }
  return result;
}

}  // namespace op_list
