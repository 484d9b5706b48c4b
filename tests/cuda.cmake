# The CUDA back end. The plugin itself where nvcc is found; everywhere its double for the tests: the same host code and the
# same kernels, compiled as C++ and run on the CPU. Included at the end of CMakeLists.txt.
set(cuda_dir ${CMAKE_SOURCE_DIR}/src/compute/cuda)
set(cuda_host ${cuda_dir}/cu_memory.cpp ${cuda_dir}/cu_weights.cpp ${cuda_dir}/cu_ops.cpp ${cuda_dir}/cu_plugin.cpp)
set(cuda_kernels ${cuda_dir}/kernels_rows.cu ${cuda_dir}/kernels_elements.cu ${cuda_dir}/kernels_attention.cu
    ${cuda_dir}/kernels_conv.cu)
# What a plugin needs of the layers below: it gets nothing from the program but structs.
set(cuda_below ${CMAKE_SOURCE_DIR}/src/base/error.c ${CMAKE_SOURCE_DIR}/src/base/dtype.c
    ${CMAKE_SOURCE_DIR}/src/plan/assign.c)

if(QIE_TESTS)
  add_library(qie_cuda_double MODULE ${cuda_host} ${cuda_kernels} tests/cuda/double.cpp tests/cuda/double_libs.cpp
              tests/cuda/emulate.cpp)
  set_source_files_properties(${cuda_kernels} PROPERTIES LANGUAGE CXX COMPILE_OPTIONS "-xc++")
  target_include_directories(qie_cuda_double PRIVATE include src tests/cuda)
  # Kernels index with what the hardware counts in: no conversion warnings there; fused products as the hardware has them
  # are not what is compared.
  target_compile_options(qie_cuda_double PRIVATE -O2 -Wall -Wextra -Wno-unknown-pragmas $<$<BOOL:${QIE_WERROR}>:-Werror>)
  set_target_properties(qie_cuda_double PROPERTIES PREFIX "" CXX_VISIBILITY_PRESET hidden
                        LIBRARY_OUTPUT_DIRECTORY ${CMAKE_BINARY_DIR}/tests)
  target_link_libraries(qie_cuda_double PRIVATE qie_static)
  if(NOT QIE_SANITIZE) # the sanitizers' own functions come from the program
    target_link_options(qie_cuda_double PRIVATE -Wl,--no-undefined)
  endif()

  # Programs that hold the double in themselves: kernels against plain C, the double's own promises.
  foreach(name test_cuda_kernels)
    add_executable(${name} tests/cuda/${name}.cpp ${cuda_kernels} tests/cuda/double.cpp tests/cuda/emulate.cpp)
    target_include_directories(${name} PRIVATE tests/cuda tests/lib)
    target_compile_options(${name} PRIVATE -O2 -Wall -Wextra -Wno-unknown-pragmas)
    set_target_properties(${name} PROPERTIES RUNTIME_OUTPUT_DIRECTORY ${CMAKE_BINARY_DIR}/tests)
    target_link_libraries(${name} PRIVATE qie_static)
    add_test(NAME ${name} COMMAND ${name} WORKING_DIRECTORY ${CMAKE_SOURCE_DIR})
    set_tests_properties(${name} PROPERTIES TIMEOUT 600)
  endforeach()
  add_executable(test_cuda_engine tests/cuda/test_cuda_engine.c)
  target_include_directories(test_cuda_engine PRIVATE tests/cuda tests/lib)
  target_compile_options(test_cuda_engine PRIVATE ${QIE_WARNINGS})
  target_compile_definitions(test_cuda_engine PRIVATE QIE_SOURCE_DIR="${CMAKE_SOURCE_DIR}" QIE_BINARY_DIR="${CMAKE_BINARY_DIR}")
  set_target_properties(test_cuda_engine PROPERTIES RUNTIME_OUTPUT_DIRECTORY ${CMAKE_BINARY_DIR}/tests)
  target_link_libraries(test_cuda_engine PRIVATE qie_static)
  add_dependencies(test_cuda_engine qie_cuda_double)
  add_test(NAME test_cuda_engine COMMAND test_cuda_engine WORKING_DIRECTORY ${CMAKE_SOURCE_DIR})
  set_tests_properties(test_cuda_engine PROPERTIES TIMEOUT 600)
endif()
