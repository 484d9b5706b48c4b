# Tests of the service from outside: the program with the demo model and a driver that talks HTTP to it.
if(QIE_TESTS AND TARGET qwen-edit)
  find_package(Python3 COMPONENTS Interpreter)
  if(Python3_FOUND)
    add_test(NAME service COMMAND ${Python3_EXECUTABLE} ${CMAKE_SOURCE_DIR}/tests/api/test_service.py
             $<TARGET_FILE:qwen-edit> WORKING_DIRECTORY ${CMAKE_BINARY_DIR})
    set_tests_properties(service PROPERTIES TIMEOUT 600)
    add_test(NAME service_remote COMMAND ${Python3_EXECUTABLE} ${CMAKE_SOURCE_DIR}/tests/api/test_remote.py
             $<TARGET_FILE:qwen-edit> WORKING_DIRECTORY ${CMAKE_BINARY_DIR})
    set_tests_properties(service_remote PROPERTIES TIMEOUT 600)
  endif()
endif()
