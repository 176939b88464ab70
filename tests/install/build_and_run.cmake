# cmake -D source= -D binary= -D generator= -D arguments=A|B -P build_and_run.cmake
# Configures and builds a consumer project from nothing, and runs its tests.
string(REPLACE "|" ";" arguments "${arguments}")
file(REMOVE_RECURSE ${binary})
foreach(command IN ITEMS
    "${CMAKE_COMMAND};-S;${source};-B;${binary};-G;${generator};${arguments}"
    "${CMAKE_COMMAND};--build;${binary};--parallel;2"
    "${CMAKE_CTEST_COMMAND};--test-dir;${binary};--output-on-failure;--no-tests=error")
  execute_process(COMMAND ${command} RESULT_VARIABLE result)
  if(NOT result EQUAL 0)
    list(JOIN command " " line)
    message(FATAL_ERROR "failed: ${line}")
  endif()
endforeach()
