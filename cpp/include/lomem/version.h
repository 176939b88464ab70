// The only place with the version: CMake and the Python build read these three lines.
#pragma once

#define LOMEM_VERSION_MAJOR 0
#define LOMEM_VERSION_MINOR 1
#define LOMEM_VERSION_PATCH 0

#define LOMEM_DETAIL_STRINGIZE_(x) #x
#define LOMEM_DETAIL_STRINGIZE(x) LOMEM_DETAIL_STRINGIZE_(x)
#define LOMEM_VERSION                         \
  LOMEM_DETAIL_STRINGIZE(LOMEM_VERSION_MAJOR) \
  "." LOMEM_DETAIL_STRINGIZE(LOMEM_VERSION_MINOR) "." LOMEM_DETAIL_STRINGIZE(LOMEM_VERSION_PATCH)
