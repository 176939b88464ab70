# LOMEM_OBJECTS: the file lomem-objects.cmake of another build of the same sources, whose objects of the library are
# linked here instead of compiled again. That build must be there; its objects are brought up to date whenever this one is.
# Sets LOMEM_OP_OBJECTS and LOMEM_KERNEL_OBJECTS.
set(lomem_objects_are
  "${CMAKE_BUILD_TYPE} ${CMAKE_CXX_COMPILER_ID} ${CMAKE_CXX_COMPILER_VERSION} '${CMAKE_CXX_FLAGS}' ${LOMEM_TORCH_PREFIX} CUDA ${LOMEM_WITH_CUDA}")
string(STRIP "${lomem_objects_are}" lomem_objects_are)

if(LOMEM_OBJECTS)
  if(NOT EXISTS ${LOMEM_OBJECTS})
    message(FATAL_ERROR "lomem: LOMEM_OBJECTS is ${LOMEM_OBJECTS}, expected the lomem-objects.cmake of another build.")
  endif()
  include(${LOMEM_OBJECTS})
  if(NOT LOMEM_OBJECTS_ARE STREQUAL lomem_objects_are)
    message(FATAL_ERROR "lomem: the objects of ${LOMEM_OBJECTS} are of another build: ${LOMEM_OBJECTS_ARE}, expected "
      "${lomem_objects_are}")
  endif()
  get_filename_component(lomem_objects_build ${LOMEM_OBJECTS} DIRECTORY)
  add_custom_target(lomem_objects_of_another_build
    COMMAND ${CMAKE_COMMAND} --build ${lomem_objects_build} --target lomem_all_objects
    BYPRODUCTS ${LOMEM_OP_OBJECTS} ${LOMEM_KERNEL_OBJECTS}
    COMMENT "Objects of ${lomem_objects_build}")
endif()

# Writes that file for this build.
function(lomem_export_objects)
  add_custom_target(lomem_all_objects DEPENDS ${LOMEM_OP_OBJECTS} ${LOMEM_KERNEL_OBJECTS})
  file(GENERATE OUTPUT ${PROJECT_BINARY_DIR}/lomem-objects.cmake CONTENT
"set(LOMEM_OBJECTS_ARE \"${lomem_objects_are}\")
set(LOMEM_OP_OBJECTS \"${LOMEM_OP_OBJECTS}\")
set(LOMEM_KERNEL_OBJECTS \"$<JOIN:${LOMEM_KERNEL_OBJECTS},;>\")
")
endfunction()
