// What is computed once for the arguments of an op.
#pragma once

#include <cstddef>
#include <map>
#include <memory>
#include <mutex>
#include <shared_mutex>
#include <utility>

namespace lomem::detail {

/// Entries are added and never change. There are at most `most`, which limits the memory of a program that changes a
/// parameter in every step.
template <class Key, class Value, size_t most>
class Cache {
 public:
  /// The value of a key, made by `make()` if it is not there.
  template <class Make>
  std::shared_ptr<const Value> get(const Key& key, const Make& make) {
    {
      const std::shared_lock lock(mutex_);
      if (const auto entry = entries_.find(key); entry != entries_.end()) {
        return entry->second;
      }
    }
    std::shared_ptr<const Value> found(new Value(make()));  // (Values need not be movable.)
    const std::unique_lock lock(mutex_);
    if (entries_.size() < most) {
      return entries_.emplace(key, std::move(found)).first->second;
    }
    return found;
  }

 private:
  std::shared_mutex mutex_;
  std::map<Key, std::shared_ptr<const Value>> entries_;
};

}  // namespace lomem::detail
