# Finds torch and sets LOMEM_TORCH_VERSION (major.minor) and LOMEM_TORCH_CUDA, the version of CUDA that this torch
# was built with, or nothing.
#
# A Python build takes the torch of the Python environment that will run it, and no other. A plain
# CMake build takes the one on CMAKE_PREFIX_PATH or in Torch_DIR, else that of the Python found.
#
# (A CUDA build of torch adds flags for architectures of its own choice to CMAKE_CUDA_FLAGS; LomemCuda chooses.)
set(cuda_flags_before_torch "${CMAKE_CUDA_FLAGS}")
if(NOT SKBUILD)
  find_package(Torch CONFIG QUIET)
endif()

if(NOT Torch_FOUND)
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
      find_package(Torch CONFIG REQUIRED)
    endif()
  endif()
endif()

if(NOT Torch_FOUND)
  message(FATAL_ERROR "lomem: no torch in reach: install torch 2.11 or newer in the Python environment that you "
    "build with (and pass --no-build-isolation to pip), or put a LibTorch on CMAKE_PREFIX_PATH, or set "
    "-DLOMEM_TORCH=OFF for the header-only core.")
endif()
if(Torch_VERSION VERSION_LESS 2.11)
  message(FATAL_ERROR "lomem: found torch ${Torch_VERSION} in ${Torch_DIR}, expected 2.11 or newer.")
endif()
# As a subproject: torch's targets must be visible where lomem is linked, which is elsewhere.
get_property(imported_targets DIRECTORY PROPERTY IMPORTED_TARGETS)
foreach(target IN LISTS imported_targets)
  set_target_properties(${target} PROPERTIES IMPORTED_GLOBAL TRUE)
endforeach()

set(CMAKE_CUDA_FLAGS "${cuda_flags_before_torch}")
set(LOMEM_TORCH_CUDA "")
if(TARGET torch_cuda)
  set(LOMEM_TORCH_CUDA TRUE)
endif()
string(REGEX MATCH "^[0-9]+\\.[0-9]+" LOMEM_TORCH_VERSION "${Torch_VERSION}")
message(STATUS "lomem: building against torch ${Torch_VERSION} in ${Torch_DIR}")
