# The CUDA back end. The plugin itself where nvcc is found; everywhere its double for the tests: the same host code and the
# same kernels, compiled as C++ and run on the CPU. Included at the end of CMakeLists.txt.
set(cuda_dir ${CMAKE_SOURCE_DIR}/src/compute/cuda)
set(cuda_host ${cuda_dir}/cu_memory.cpp ${cuda_dir}/cu_weights.cpp ${cuda_dir}/cu_ops.cpp ${cuda_dir}/cu_plugin.cpp
    ${cuda_dir}/cu_profile.cpp ${cuda_dir}/cu_repeat.cpp)
set(cuda_kernels ${cuda_dir}/kernels_rows.cu ${cuda_dir}/kernels_elements.cu ${cuda_dir}/kernels_attention.cu
    ${cuda_dir}/kernels_conv.cu)
# What a plugin needs of the layers below: it gets nothing from the program but structs.
set(cuda_below ${CMAKE_SOURCE_DIR}/src/base/error.c ${CMAKE_SOURCE_DIR}/src/base/blocks.c src/base/dtype.c
    ${CMAKE_SOURCE_DIR}/src/plan/assign.c)

# In the sanitizers' builds only when asked for: fibers on stacks of their own, thread by thread, take minutes there.
option(QIE_CUDA_SANITIZED "the CUDA double and its tests in a sanitizers' build, too" OFF)
if(QIE_TESTS AND (NOT QIE_SANITIZE OR QIE_CUDA_SANITIZED))
  add_library(qie_cuda_double MODULE ${cuda_host} ${cuda_kernels} tests/cuda/double.cpp tests/cuda/double_libs.cpp
              tests/cuda/emulate.cpp)
  set_source_files_properties(${cuda_kernels} PROPERTIES LANGUAGE CXX COMPILE_OPTIONS "-xc++")
  target_include_directories(qie_cuda_double PRIVATE include src tests/cuda)
  # Kernels index with what the hardware counts in: no conversion warnings there; fused products as the hardware has them
  # are not what is compared.
  target_compile_options(qie_cuda_double PRIVATE -O3 -Wall -Wextra -Wno-unknown-pragmas $<$<BOOL:${QIE_WERROR}>:-Werror>)
  set_target_properties(qie_cuda_double PROPERTIES PREFIX "" CXX_VISIBILITY_PRESET hidden
                        LIBRARY_OUTPUT_DIRECTORY ${CMAKE_BINARY_DIR}/tests)
  target_link_libraries(qie_cuda_double PRIVATE qie_static)
  if(NOT QIE_SANITIZE) # the sanitizers' own functions come from the program
    target_link_options(qie_cuda_double PRIVATE -Wl,--no-undefined)
  endif()

  # What stands in for libcudnn.so.9 in tests.
  add_library(fake_cudnn MODULE tests/cuda/fake_cudnn.cpp)
  target_compile_options(fake_cudnn PRIVATE -O2 -Wall -Wextra)
  target_link_libraries(fake_cudnn PRIVATE dl)
  set_target_properties(fake_cudnn PROPERTIES PREFIX "" CXX_VISIBILITY_PRESET hidden LIBRARY_OUTPUT_DIRECTORY ${CMAKE_BINARY_DIR}/tests)

  # cuDNN itself where it is installed: no card is needed to ask it for plans.
  find_library(QIE_CUDNN NAMES libcudnn.so.9 HINTS /usr/local/cuda/lib /usr/local/cuda/lib64)
  set(real_cudnn "")
  if(QIE_CUDNN AND NOT QIE_SANITIZE)
    set(real_cudnn ${QIE_CUDNN})
  endif()

  # Programs that hold the double in themselves: kernels against plain C, the double's own promises.
  foreach(name test_cuda_kernels)
    add_executable(${name} tests/cuda/${name}.cpp ${cuda_kernels} ${cuda_dir}/cu_cudnn.cpp tests/cuda/double.cpp
                   tests/cuda/emulate.cpp)
    target_include_directories(${name} PRIVATE tests/cuda tests/lib)
    target_compile_options(${name} PRIVATE -O2 -Wall -Wextra -Wno-unknown-pragmas)
    target_compile_definitions(${name} PRIVATE FAKE_CUDNN="$<TARGET_FILE:fake_cudnn>" REAL_CUDNN="${real_cudnn}")
    add_dependencies(${name} fake_cudnn)
    set_target_properties(${name} PROPERTIES RUNTIME_OUTPUT_DIRECTORY ${CMAKE_BINARY_DIR}/tests)
    target_link_libraries(${name} PRIVATE qie_static)
    add_test(NAME ${name} COMMAND ${name} WORKING_DIRECTORY ${CMAKE_SOURCE_DIR})
    set_tests_properties(${name} PROPERTIES TIMEOUT 600)
  endforeach()
  add_executable(test_cuda_ops tests/cuda/test_cuda_ops.c)
  target_include_directories(test_cuda_ops PRIVATE tests/lib)
  target_compile_options(test_cuda_ops PRIVATE ${QIE_WARNINGS})
  target_compile_definitions(test_cuda_ops PRIVATE QIE_BINARY_DIR="${CMAKE_BINARY_DIR}")
  set_target_properties(test_cuda_ops PROPERTIES RUNTIME_OUTPUT_DIRECTORY ${CMAKE_BINARY_DIR}/tests)
  target_link_libraries(test_cuda_ops PRIVATE qie_static)
  add_dependencies(test_cuda_ops qie_cuda_double)
  add_test(NAME test_cuda_ops COMMAND test_cuda_ops)
  add_executable(test_cuda_engine tests/cuda/test_cuda_engine.c)
  target_include_directories(test_cuda_engine PRIVATE tests/cuda tests/lib)
  target_compile_options(test_cuda_engine PRIVATE ${QIE_WARNINGS})
  target_compile_definitions(test_cuda_engine PRIVATE QIE_SOURCE_DIR="${CMAKE_SOURCE_DIR}" QIE_BINARY_DIR="${CMAKE_BINARY_DIR}")
  set_target_properties(test_cuda_engine PROPERTIES RUNTIME_OUTPUT_DIRECTORY ${CMAKE_BINARY_DIR}/tests)
  target_link_libraries(test_cuda_engine PRIVATE qie_static)
  add_dependencies(test_cuda_engine qie_cuda_double)
  add_test(NAME test_cuda_engine COMMAND test_cuda_engine WORKING_DIRECTORY ${CMAKE_SOURCE_DIR})
  set_tests_properties(test_cuda_engine PROPERTIES TIMEOUT 1500)
  find_package(Python3 COMPONENTS Interpreter)
  if(Python3_FOUND AND TARGET qwen-edit)
    add_test(NAME test_place_agrees COMMAND ${Python3_EXECUTABLE} ${CMAKE_SOURCE_DIR}/tests/api/test_place_agrees.py
             $<TARGET_FILE:qwen-edit> ${CMAKE_BINARY_DIR}/tests $<TARGET_FILE:sparse_model>)
    set_tests_properties(test_place_agrees PROPERTIES TIMEOUT 300)
    add_test(NAME test_gpu_faults COMMAND ${Python3_EXECUTABLE} ${CMAKE_SOURCE_DIR}/tests/api/test_gpu_faults.py
             $<TARGET_FILE:qwen-edit> ${CMAKE_BINARY_DIR}/tests)
    set_tests_properties(test_gpu_faults PROPERTIES TIMEOUT 600)
    # what bench/gpu.sh runs behind the build
    add_test(NAME gpu_report COMMAND ${Python3_EXECUTABLE} ${CMAKE_SOURCE_DIR}/bench/gpu.py --build ${CMAKE_BINARY_DIR}
             --out ${CMAKE_BINARY_DIR}/gpu-report --double)
    set_tests_properties(gpu_report PROPERTIES TIMEOUT 300)
  endif()
endif()

# ---------------------------------------------------------------- the plugin itself
# QIE_CUDA: AUTO builds it where nvcc 12.8 or newer is found, ON demands it, OFF never. QIE_CUDA_ARCHS: all generations by
# default; one of them (90a) builds in a sixth of the time.
set(QIE_CUDA AUTO CACHE STRING "CUDA back end: AUTO, ON or OFF")
set(QIE_CUDA_ARCHS "80;86;89;90a;100;120" CACHE STRING "architectures of the CUDA back end; the last one as PTX too")
find_program(QIE_NVCC nvcc HINTS $ENV{CUDA_HOME}/bin /usr/local/cuda/bin)
set(nvcc_version 0)
if(QIE_NVCC AND NOT QIE_CUDA STREQUAL OFF)
  execute_process(COMMAND ${QIE_NVCC} --version OUTPUT_VARIABLE nvcc_says ERROR_QUIET)
  if(nvcc_says MATCHES "release ([0-9]+\\.[0-9]+)")
    set(nvcc_version ${CMAKE_MATCH_1})
  endif()
endif()
get_filename_component(nvcc_real "${QIE_NVCC}" REALPATH)
get_filename_component(cuda_home "${nvcc_real}" DIRECTORY)
get_filename_component(cuda_home "${cuda_home}" DIRECTORY)
find_path(QIE_CUDA_INCLUDE cublasLt.h HINTS ${cuda_home}/include /usr/local/cuda/include)
find_library(QIE_CUBLASLT NAMES cublasLt libcublasLt.so.13 libcublasLt.so.12 HINTS ${cuda_home}/lib64 ${cuda_home}/lib /usr/local/cuda/lib64)
find_library(QIE_CUDART NAMES cudart_static HINTS ${cuda_home}/lib64 ${cuda_home}/lib /usr/local/cuda/lib64)
if(nvcc_version VERSION_GREATER_EQUAL 12.8 AND QIE_CUDA_INCLUDE AND QIE_CUBLASLT AND QIE_CUDART AND NOT QIE_SANITIZE)
  set(cuda_flags -std=c++17 -O3 -lineinfo -Xcompiler=-fPIC,-fvisibility=hidden -I${CMAKE_SOURCE_DIR}/src -I${CMAKE_SOURCE_DIR}/include)
  foreach(arch ${QIE_CUDA_ARCHS})
    list(APPEND cuda_flags -gencode=arch=compute_${arch},code=sm_${arch})
    set(last_arch ${arch})
  endforeach()
  list(APPEND cuda_flags -gencode=arch=compute_${last_arch},code=compute_${last_arch})
  file(GLOB cuda_headers CONFIGURE_DEPENDS ${cuda_dir}/*.hpp ${cuda_dir}/*.h ${cuda_dir}/*.cuh)
  set(cuda_objects)
  foreach(src ${cuda_kernels})
    get_filename_component(name ${src} NAME_WE)
    set(object ${CMAKE_BINARY_DIR}/cuda/${name}.o)
    add_custom_command(OUTPUT ${object} COMMAND ${CMAKE_COMMAND} -E make_directory ${CMAKE_BINARY_DIR}/cuda
                       COMMAND ${QIE_NVCC} ${cuda_flags} -c ${src} -o ${object}
                       DEPENDS ${src} ${cuda_headers} ${CMAKE_SOURCE_DIR}/src/compute/backend.h COMMENT "CUDA ${name}")
    list(APPEND cuda_objects ${object})
  endforeach()
  add_library(qie_cuda MODULE ${cuda_host} ${cuda_dir}/cu_rt.cpp ${cuda_dir}/cu_libs.cpp ${cuda_dir}/cu_cudnn.cpp ${cuda_below} ${cuda_objects})
  target_include_directories(qie_cuda PRIVATE include src)
  target_include_directories(qie_cuda SYSTEM PRIVATE ${QIE_CUDA_INCLUDE})
  target_compile_options(qie_cuda PRIVATE -Wall -Wextra $<$<BOOL:${QIE_WERROR}>:-Werror>)
  set_target_properties(qie_cuda PROPERTIES PREFIX "" CXX_VISIBILITY_PRESET hidden)
  target_link_libraries(qie_cuda PRIVATE ${QIE_CUDART} ${QIE_CUBLASLT} Threads::Threads rt dl m)
  target_link_options(qie_cuda PRIVATE -Wl,--no-undefined)
  install(TARGETS qie_cuda LIBRARY DESTINATION lib/qwen-edit)
elseif(QIE_CUDA STREQUAL ON)
  message(FATAL_ERROR "QIE_CUDA=ON: nvcc 12.8 or newer with cuBLASLt is not found (nvcc: ${QIE_NVCC}, ${nvcc_version})")
endif()
