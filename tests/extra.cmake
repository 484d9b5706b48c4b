# Tests that need more than one source file and the library. Included at the end of CMakeLists.txt.
if(QIE_TESTS AND TARGET qwen-edit)
  # The option table and its readers: the program's sources without its main.
  set(cli_parts ${QIE_CLI_SOURCES})
  list(FILTER cli_parts EXCLUDE REGEX "/src/cli/main\\.c$")
  add_executable(test_cli_options tests/unit/cli/test_cli_options.c ${cli_parts})
  target_include_directories(test_cli_options PRIVATE tests/lib)
  target_compile_options(test_cli_options PRIVATE $<$<COMPILE_LANGUAGE:C>:${QIE_WARNINGS}>)
  target_compile_definitions(test_cli_options PRIVATE QIE_VERSION="${PROJECT_VERSION}")
  set_target_properties(test_cli_options PROPERTIES RUNTIME_OUTPUT_DIRECTORY ${CMAKE_BINARY_DIR}/tests)
  target_link_libraries(test_cli_options PRIVATE qie_static qie_program_libs)
  add_test(NAME test_cli_options COMMAND test_cli_options WORKING_DIRECTORY ${CMAKE_SOURCE_DIR})
  set_tests_properties(test_cli_options PROPERTIES TIMEOUT 120 SKIP_RETURN_CODE 77)
endif()
