// What is computed once for the arguments of an op.
#pragma once

#include <cstddef>
#include <map>
#include <memory>
#include <mutex>
#include <shared_mutex>
#include <utility>

namespace lomem::detail {

/// Entries never change. There are at most `most`; if there are more, all are dropped and made again where they are
/// still needed: of a program that changes a parameter in every step, memory is limited, and the others' calls stay
/// quick.
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
    if (entries_.size() >= most) {
      entries_.clear();
    }
    return entries_.emplace(key, std::move(found)).first->second;
  }

 private:
  std::shared_mutex mutex_;
  std::map<Key, std::shared_ptr<const Value>> entries_;
};

}  // namespace lomem::detail
