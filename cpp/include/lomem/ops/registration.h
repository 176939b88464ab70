// Keeps the library linked into programs that call the ops only through the dispatcher. Loading it registers the ops.
#pragma once

#include <lomem/config.h>

namespace lomem::detail {

/// Referenced by every translation unit that includes a header of ops, so that a linker that drops libraries without
/// referenced symbols keeps this one, and with it the registration of the ops.
LOMEM_API extern const int registration;
[[maybe_unused]] [[gnu::used]] static const int* const keep_registration = &registration;

}  // namespace lomem::detail
