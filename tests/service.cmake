# Tests of the service from outside: the program with the demo model, or with a stand-in for its worker, and drivers
# that talk HTTP to it.
if(QIE_TESTS AND TARGET qwen-edit)
  find_package(Python3 COMPONENTS Interpreter)
  add_executable(fakeworker tests/api/fakeworker.c src/service/common/message.c src/service/worker/sandbox.c)
  target_compile_options(fakeworker PRIVATE ${QIE_WARNINGS})
  target_link_libraries(fakeworker PRIVATE qie_static)
  if(SECCOMP_FOUND)
    target_link_libraries(fakeworker PRIVATE PkgConfig::SECCOMP)
    target_compile_definitions(fakeworker PRIVATE QIE_HAVE_SECCOMP)
  endif()
  set_target_properties(fakeworker PROPERTIES RUNTIME_OUTPUT_DIRECTORY ${CMAKE_BINARY_DIR}/tests)
  add_library(fakeclock MODULE tests/api/fakeclock.c)
  target_compile_options(fakeclock PRIVATE ${QIE_WARNINGS})
  set_target_properties(fakeclock PROPERTIES PREFIX "" LIBRARY_OUTPUT_DIRECTORY ${CMAKE_BINARY_DIR}/tests)
  if(Python3_FOUND)
    set(service_drivers test_service test_service_queue test_service_http)
    # What waits for clocks, deaths and pictures takes many minutes in slow code: under the sanitizers with
    # QIE_TEST_LONG only.
    if(NOT QIE_SANITIZE OR DEFINED ENV{QIE_TEST_LONG})
      list(APPEND service_drivers test_service_worker test_service_state test_service_kill test_service_ops
           test_service_schema test_service_lora test_remote test_client)
    endif()
    if(TARGET qie_cuda_double AND cuda_all)
      list(APPEND service_drivers test_service_gpu)
    endif()
    foreach(driver ${service_drivers})
      string(REPLACE "test_" "" name ${driver})
      add_test(NAME ${name} COMMAND ${Python3_EXECUTABLE} ${CMAKE_SOURCE_DIR}/tests/api/${driver}.py
               $<TARGET_FILE:qwen-edit> $<TARGET_FILE:fakeworker> WORKING_DIRECTORY ${CMAKE_BINARY_DIR})
      set_tests_properties(${name} PROPERTIES TIMEOUT 1500 SKIP_RETURN_CODE 77)
    endforeach()
    if(NOT QIE_SANITIZE)
      add_test(NAME service_openai COMMAND ${Python3_EXECUTABLE} ${CMAKE_SOURCE_DIR}/tests/api/test_openai.py
               $<TARGET_FILE:qwen-edit> ${CMAKE_BINARY_DIR}/openai WORKING_DIRECTORY ${CMAKE_BINARY_DIR})
      set_tests_properties(service_openai PROPERTIES TIMEOUT 1500 SKIP_RETURN_CODE 77)
    endif()
    if(NOT QIE_SANITIZE)
      add_test(NAME lora_base COMMAND ${Python3_EXECUTABLE} ${CMAKE_SOURCE_DIR}/tests/api/test_lora_base.py
               $<TARGET_FILE:qwen-edit> WORKING_DIRECTORY ${CMAKE_BINARY_DIR})
      set_tests_properties(lora_base PROPERTIES TIMEOUT 600)
    endif()
    add_test(NAME python_package COMMAND ${Python3_EXECUTABLE} ${CMAKE_SOURCE_DIR}/tests/api/test_python.py
             $<TARGET_FILE:qwen-edit> $<TARGET_FILE:qie> ${CMAKE_SOURCE_DIR}/include WORKING_DIRECTORY ${CMAKE_BINARY_DIR})
    set_tests_properties(python_package PROPERTIES TIMEOUT 600 SKIP_RETURN_CODE 77)
    # The documents' commands as they stand; with the package that the test before has installed, if it did.
    add_test(NAME service_docs COMMAND ${Python3_EXECUTABLE} ${CMAKE_SOURCE_DIR}/tests/api/test_docs.py
             $<TARGET_FILE:qwen-edit> ${CMAKE_BINARY_DIR}/openai/bin/python WORKING_DIRECTORY ${CMAKE_BINARY_DIR})
    set_tests_properties(service_docs PROPERTIES TIMEOUT 1500)
    if(NOT QIE_SANITIZE)
      set_tests_properties(service_docs PROPERTIES DEPENDS service_openai)
    endif()
    # The page in a browser; screenshots stay in page/. Slow code is used for what reaches the service most.
    set(page_only "")
    if(QIE_SANITIZE)
      set(page_only --only generate_and_compare cancel reload_and_second_tab service_that_restarts)
    endif()
    add_test(NAME service_page COMMAND ${Python3_EXECUTABLE} ${CMAKE_SOURCE_DIR}/tests/api/page_test.py
             --program $<TARGET_FILE:qwen-edit> --out ${CMAKE_BINARY_DIR}/page ${page_only}
             WORKING_DIRECTORY ${CMAKE_BINARY_DIR})
    set_tests_properties(service_page PROPERTIES TIMEOUT 1500 SKIP_RETURN_CODE 77)
  endif()
endif()
