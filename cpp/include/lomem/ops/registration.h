// Keeps the library, which registers the ops when it is loaded, in programs that call them only through the dispatcher.
#pragma once

#include <lomem/config.h>

namespace lomem::detail {

/// Referenced by every translation unit that includes a header of ops, so that a linker that drops libraries without
/// referenced symbols keeps this one and with it the ops' registration.
LOMEM_API extern const int registration;
[[maybe_unused]] [[gnu::used]] static const int* const keep_registration = &registration;

}  // namespace lomem::detail
