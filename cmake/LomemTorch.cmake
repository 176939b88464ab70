# Finds torch. Sets LOMEM_TORCH_VERSION (major.minor), LOMEM_TORCH_PREFIX and LOMEM_TORCH_CUDA (whether this torch has
# CUDA), and defines the target lomem_libtorch.
#
# A Python build uses only the torch of the Python environment that will run it. A plain CMake build uses the one in
# Torch_DIR or on CMAKE_PREFIX_PATH, or otherwise that of the Python it finds.
#
# torch's own CMake package is inspected, not loaded: with a CUDA build of torch it fails where there is no CUDA
# toolkit, which lomem's CPU kernels do not need, and it adds its own flags to CUDA code.
if(NOT SKBUILD AND NOT Torch_DIR AND NOT CMAKE_DISABLE_FIND_PACKAGE_Torch)
  file(TO_CMAKE_PATH "$ENV{CMAKE_PREFIX_PATH}" environment_prefixes)
  find_path(Torch_DIR TorchConfig.cmake
    HINTS ${Torch_ROOT} $ENV{Torch_ROOT} ${CMAKE_PREFIX_PATH} ${environment_prefixes}
    PATH_SUFFIXES share/cmake/Torch torch/share/cmake/Torch)
endif()
if(SKBUILD OR (NOT Torch_DIR AND NOT CMAKE_DISABLE_FIND_PACKAGE_Python))
  find_package(Python COMPONENTS Interpreter QUIET)
  if(Python_Interpreter_FOUND)
    execute_process(
      COMMAND ${Python_EXECUTABLE} ${CMAKE_CURRENT_LIST_DIR}/lomem_torch.py
      OUTPUT_VARIABLE python_torch_dir OUTPUT_STRIP_TRAILING_WHITESPACE ERROR_QUIET
      RESULT_VARIABLE python_torch_result)
    if(python_torch_result EQUAL 0)
      if(SKBUILD AND Torch_DIR AND NOT Torch_DIR STREQUAL python_torch_dir)
        message(FATAL_ERROR "lomem: Torch_DIR is ${Torch_DIR}, but the torch that this Python would run lomem with "
          "is in ${python_torch_dir}; unset Torch_DIR.")
      endif()
      set(Torch_DIR ${python_torch_dir} CACHE PATH "Where TorchConfig.cmake is" FORCE)
    endif()
  endif()
endif()

if(NOT Torch_DIR OR NOT EXISTS "${Torch_DIR}/TorchConfigVersion.cmake")
  message(FATAL_ERROR "lomem: no torch found: install torch 2.11 or newer in the Python environment that you "
    "build with (and pass --no-build-isolation to pip), or put a LibTorch on CMAKE_PREFIX_PATH, or set "
    "-DLOMEM_TORCH=OFF for the header-only core.")
endif()
include("${Torch_DIR}/TorchConfigVersion.cmake")  # sets PACKAGE_VERSION
if(PACKAGE_VERSION VERSION_LESS 2.11)
  message(FATAL_ERROR "lomem: found torch ${PACKAGE_VERSION} in ${Torch_DIR}, expected 2.11 or newer.")
endif()
string(REGEX MATCH "^[0-9]+\\.[0-9]+" LOMEM_TORCH_VERSION "${PACKAGE_VERSION}")
message(STATUS "lomem: building against torch ${PACKAGE_VERSION} in ${Torch_DIR}")

get_filename_component(LOMEM_TORCH_PREFIX "${Torch_DIR}/../../.." ABSOLUTE)
foreach(library IN ITEMS torch torch_cpu c10)
  find_library(LOMEM_${library}_LIBRARY ${library} PATHS "${LOMEM_TORCH_PREFIX}/lib" NO_DEFAULT_PATH REQUIRED)
  mark_as_advanced(LOMEM_${library}_LIBRARY)
endforeach()
find_library(LOMEM_torch_cuda_LIBRARY torch_cuda PATHS "${LOMEM_TORCH_PREFIX}/lib" NO_DEFAULT_PATH)
mark_as_advanced(LOMEM_torch_cuda_LIBRARY)
set(LOMEM_TORCH_CUDA OFF)
if(LOMEM_torch_cuda_LIBRARY)
  set(LOMEM_TORCH_CUDA ON)
endif()

# The installed package uses torch's own target, `torch`, instead.
add_library(lomem_libtorch INTERFACE)
target_include_directories(lomem_libtorch SYSTEM INTERFACE
  "${LOMEM_TORCH_PREFIX}/include" "${LOMEM_TORCH_PREFIX}/include/torch/csrc/api/include")
target_link_libraries(lomem_libtorch INTERFACE
  "${LOMEM_torch_LIBRARY}" "${LOMEM_torch_cpu_LIBRARY}" "${LOMEM_c10_LIBRARY}")
if(LOMEM_TORCH_CUDA AND CMAKE_SYSTEM_NAME STREQUAL "Linux")
  # Programs need torch_cuda kept explicitly: its kernels register themselves, so no symbol refers to it. Its own
  # dependencies (cuBLAS, ...) are resolved at run time. lomem's own libraries do not need it.
  target_link_options(lomem_libtorch INTERFACE
    "$<$<STREQUAL:$<TARGET_PROPERTY:TYPE>,EXECUTABLE>:LINKER:--push-state,--no-as-needed,${LOMEM_torch_cuda_LIBRARY},--pop-state,--allow-shlib-undefined>")
endif()
