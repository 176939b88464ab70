# cmake -D binary= -D prefix= -D forbidden=A|B [-D source= -D generator= -D arguments=A|B] -P install_and_move.cmake
# Installs a build (made first, where `source` is given) to `prefix`, then moves it to
# `prefix`-moved: an installation must not remember where it was made.
file(REMOVE_RECURSE ${prefix} ${prefix}-moved)
if(source)
  string(REPLACE "|" ";" arguments "${arguments}")
  file(REMOVE_RECURSE ${binary})
  execute_process(COMMAND ${CMAKE_COMMAND} -S ${source} -B ${binary} -G ${generator} ${arguments}
    COMMAND_ERROR_IS_FATAL ANY)
endif()
execute_process(COMMAND ${CMAKE_COMMAND} --install ${binary} --prefix ${prefix} COMMAND_ERROR_IS_FATAL ANY)

# The CMake files may name neither prefix nor sources nor build nor torch, nor anything else that looks absolute.
string(REPLACE "|" ";" forbidden "${forbidden}|${prefix}")
file(GLOB_RECURSE cmake_files ${prefix}/*.cmake)
foreach(file IN LISTS cmake_files)
  file(STRINGS ${file} absolute REGEX "\"/[a-z]|[ ;(]/(usr|home|root|tmp|work|opt)/")
  file(READ ${file} content)
  foreach(path IN LISTS forbidden)
    string(FIND "${content}" "${path}" position)
    if(NOT position EQUAL -1)
      list(APPEND absolute "${path}")
    endif()
  endforeach()
  if(absolute)
    message(FATAL_ERROR "${file} holds an absolute path: ${absolute}")
  endif()
endforeach()
file(RENAME ${prefix} ${prefix}-moved)
