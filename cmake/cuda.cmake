# Chooses nvcc and the architectures, then enables CUDA. Included by the top level.
#
# Sets JAX_AWQ_NVCC_VERSION and, for the preprocessor, JAX_AWQ_ARCHITECTURE_NAMES ("sm_80",
# "compute_75",) and JAX_AWQ_ARCHITECTURE_DEFINITIONS (the numbers of machine code and of PTX).

set(JAX_AWQ_CUDA_ARCHITECTURES "" CACHE STRING
  "CUDA architectures, as CMake writes them (80-real;90a-real;75-virtual), or `all`; \
empty: those of the GPUs of this machine, `all` if it has none")

set(JAX_AWQ_OLDEST_NVCC 12.4)

function(jax_awq_nvcc_version nvcc output)
  execute_process(COMMAND "${nvcc}" --version OUTPUT_VARIABLE text ERROR_QUIET)
  string(REGEX MATCH "V([0-9]+\\.[0-9]+\\.[0-9]+)" match "${text}")
  set(${output} "${CMAKE_MATCH_1}" PARENT_SCOPE)
endfunction()

# nvcc: the one the user names (CMAKE_CUDA_COMPILER or CUDACXX, which CMake reads by itself), that
# of CUDA_HOME or CUDA_PATH, that on PATH, and last the PyPI wheels of the build environment.
if(NOT CMAKE_CUDA_COMPILER AND NOT DEFINED ENV{CUDACXX})
  foreach(directory IN ITEMS "$ENV{CUDA_HOME}/bin" "$ENV{CUDA_PATH}/bin")
    if(EXISTS "${directory}/nvcc")
      list(APPEND candidates "${directory}/nvcc")
    endif()
  endforeach()
  find_program(JAX_AWQ_NVCC_ON_PATH nvcc NO_CACHE NO_DEFAULT_PATH PATHS ENV PATH)
  if(JAX_AWQ_NVCC_ON_PATH)
    list(APPEND candidates "${JAX_AWQ_NVCC_ON_PATH}")
  endif()
  jax_awq_python(wheel_root "
import importlib.util as u
try:
    print(u.find_spec('nvidia.cu13').submodule_search_locations[0])
except (ImportError, AttributeError):
    pass")
  if(EXISTS "${wheel_root}/bin/nvcc")
    list(APPEND candidates "${wheel_root}/bin/nvcc")
  endif()

  foreach(nvcc IN LISTS candidates)
    jax_awq_nvcc_version("${nvcc}" version)
    if(version VERSION_GREATER_EQUAL JAX_AWQ_OLDEST_NVCC)
      set(CMAKE_CUDA_COMPILER "${nvcc}")
      break()
    endif()
    message(STATUS "Skipping ${nvcc}: CUDA ${version} is older than ${JAX_AWQ_OLDEST_NVCC}")
  endforeach()
  if(NOT CMAKE_CUDA_COMPILER)
    message(FATAL_ERROR
      "No nvcc of CUDA ${JAX_AWQ_OLDEST_NVCC} or later. Name one with CUDACXX or CUDA_HOME, build "
      "with pip's build isolation, which installs one, or without CUDA: "
      "JAX_AWQ_CUDA=OFF")
  endif()
endif()

# The wheels keep their libraries in lib/, where nvcc looks in lib64/.
get_filename_component(nvcc_root "${CMAKE_CUDA_COMPILER}/../.." ABSOLUTE)
if(EXISTS "${nvcc_root}/lib/libcudart_static.a" AND NOT EXISTS "${nvcc_root}/lib64")
  set(ENV{NVCC_PREPEND_FLAGS} "-L${nvcc_root}/lib $ENV{NVCC_PREPEND_FLAGS}")
endif()

# Replaced below. Left unset, CMake would try the compiler on an architecture it may not know.
set(CMAKE_CUDA_ARCHITECTURES 80)
enable_language(CUDA)
set(JAX_AWQ_NVCC_VERSION "${CMAKE_CUDA_COMPILER_VERSION}")
if(JAX_AWQ_NVCC_VERSION VERSION_LESS JAX_AWQ_OLDEST_NVCC)
  message(FATAL_ERROR "${CMAKE_CUDA_COMPILER} is CUDA ${JAX_AWQ_NVCC_VERSION}; "
    "${JAX_AWQ_OLDEST_NVCC} or later is needed")
endif()

execute_process(COMMAND "${CMAKE_CUDA_COMPILER}" --list-gpu-code
                OUTPUT_VARIABLE known COMMAND_ERROR_IS_FATAL ANY)
string(REGEX MATCHALL "[0-9]+" known "${known}")

# Keeps those entries of a list that nvcc knows (CUDA 12.4 ends at 90).
function(jax_awq_keep_known list)
  set(kept "")
  foreach(entry IN LISTS ${list})
    string(REGEX MATCH "^[0-9]+" number "${entry}")
    if(number IN_LIST known)
      list(APPEND kept "${entry}")
    endif()
  endforeach()
  set(${list} "${kept}" PARENT_SCOPE)
endfunction()

# 8.6 and 8.9 run the code of 8.0, which nothing here would make better use of; 10.3 and 12.1 that
# of 10.0 and 12.0. Only 9.0 has instructions of its own (wgmma) that are used. GPUs between these
# or after them compile the PTX of the lowest when it is loaded.
set(all 75 80-real 90a-real 100-real 120-real)
jax_awq_keep_known(all)

function(jax_awq_gpus output)
  execute_process(COMMAND nvidia-smi --query-gpu=compute_cap --format=csv,noheader
                  OUTPUT_VARIABLE text RESULT_VARIABLE status ERROR_QUIET)
  set(gpus "")
  if(status EQUAL 0)
    string(REGEX MATCHALL "[0-9]+\\.[0-9]+" capabilities "${text}")
    foreach(capability IN LISTS capabilities)
      string(REPLACE "." "" number "${capability}")
      string(REGEX REPLACE "^90$" "90a" number "${number}")
      list(APPEND gpus "${number}-real")
    endforeach()
    list(REMOVE_DUPLICATES gpus)
  endif()
  set(${output} "${gpus}" PARENT_SCOPE)
endfunction()

set(architectures "${JAX_AWQ_CUDA_ARCHITECTURES}")
if(architectures STREQUAL "")
  jax_awq_gpus(gpus)
  set(architectures "${gpus}")
  jax_awq_keep_known(architectures)
  if(NOT architectures OR NOT architectures STREQUAL gpus)
    set(architectures "${all}")
  endif()
elseif(architectures STREQUAL "all")
  set(architectures "${all}")
endif()
string(REPLACE "," ";" architectures "${architectures}")

set(real "")
set(virtual "")
set(names "")
foreach(entry IN LISTS architectures)
  if(NOT entry MATCHES "^([0-9]+)([af]?)(-real|-virtual)?$")
    message(FATAL_ERROR "JAX_AWQ_CUDA_ARCHITECTURES: `${entry}` is not an architecture, such as "
      "80, 90a-real or 75-virtual")
  endif()
  if("${CMAKE_MATCH_1}${CMAKE_MATCH_2}" STREQUAL "90a")
    set(sm90a JAX_AWQ_SM90A)  # without the "a" there is no wgmma
  endif()
  if(NOT CMAKE_MATCH_3 STREQUAL "-virtual")
    string(APPEND real "${CMAKE_MATCH_1},")
    string(APPEND names "\"sm_${CMAKE_MATCH_1}${CMAKE_MATCH_2}\",")
  endif()
  if(NOT CMAKE_MATCH_3 STREQUAL "-real")
    string(APPEND virtual "${CMAKE_MATCH_1},")
    string(APPEND names "\"compute_${CMAKE_MATCH_1}${CMAKE_MATCH_2}\",")
  endif()
endforeach()
set(CMAKE_CUDA_ARCHITECTURES "${architectures}")
set(JAX_AWQ_ARCHITECTURE_NAMES "${names}")
set(JAX_AWQ_ARCHITECTURE_DEFINITIONS
  "JAX_AWQ_REAL_ARCHS=${real}" "JAX_AWQ_VIRTUAL_ARCHS=${virtual}" ${sm90a})
message(STATUS "CUDA ${JAX_AWQ_NVCC_VERSION}, architectures ${architectures}")
