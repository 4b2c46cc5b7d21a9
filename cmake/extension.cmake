# The Python extension: the operations on top of the backends, and their bindings.

# libmlx has no stable C++ ABI, not even between patch releases.
set(MLX_FUSED_MLX_VERSION 0.32.4)
execute_process(COMMAND "${Python_EXECUTABLE}" "${CMAKE_CURRENT_LIST_DIR}/check_mlx.py" version
                        ${MLX_FUSED_MLX_VERSION} COMMAND_ERROR_IS_FATAL ANY)

execute_process(
  COMMAND "${Python_EXECUTABLE}" -m mlx --cmake-dir
  OUTPUT_VARIABLE MLX_ROOT
  OUTPUT_STRIP_TRAILING_WHITESPACE COMMAND_ERROR_IS_FATAL ANY)
find_package(MLX CONFIG REQUIRED)

execute_process(
  COMMAND "${Python_EXECUTABLE}" -m nanobind --cmake_dir
  OUTPUT_VARIABLE nanobind_ROOT
  OUTPUT_STRIP_TRAILING_WHITESPACE COMMAND_ERROR_IS_FATAL ANY)
find_package(nanobind CONFIG REQUIRED)

# The GPU's side of evaluation: Metal where MLX has it.
if(MLX_BUILD_METAL)
  set(MLX_FUSED_GPU_SOURCES mlx_fused/backend/metal/eval.cpp mlx_fused/backend/metal/library.cpp)
else()
  set(MLX_FUSED_GPU_SOURCES mlx_fused/backend/no_metal/eval.cpp)
endif()

# NB_DOMAIN: mlx.core's types are known to extensions of the same domain only.
nanobind_add_module(
  _ext
  NB_STATIC
  NB_DOMAIN
  mlx
  python/src/bindings.cpp
  python/src/internals.cpp
  mlx_fused/arguments.cpp
  mlx_fused/call.cpp
  mlx_fused/check.cpp
  mlx_fused/composed.cpp
  mlx_fused/fused_primitive.cpp
  mlx_fused/products.cpp
  mlx_fused/projection.cpp
  mlx_fused/quantization.cpp
  mlx_fused/routing.cpp
  mlx_fused/unpack.cpp
  mlx_fused/backend/cpu/eval.cpp
  mlx_fused/backend/metal/plan.cpp
  ${MLX_FUSED_GPU_SOURCES})
target_include_directories(_ext PRIVATE "${CMAKE_SOURCE_DIR}")
target_link_libraries(_ext PRIVATE mlx_fused_cpu mlx)

if(APPLE)
  set(ORIGIN "@loader_path")
else()
  set(ORIGIN "$ORIGIN")
endif()
set_target_properties(_ext PROPERTIES BUILD_WITH_INSTALL_RPATH ON
                                      INSTALL_RPATH "${ORIGIN}/../mlx/lib;${ORIGIN}/../scipy_openblas32/lib")

add_custom_command(
  TARGET _ext
  POST_BUILD
  COMMAND "${Python_EXECUTABLE}" "${CMAKE_CURRENT_LIST_DIR}/check_mlx.py" abi "$<TARGET_FILE:_ext>"
  VERBATIM)

if(MLX_BUILD_METAL)
  include("${CMAKE_CURRENT_LIST_DIR}/metal.cmake")
endif()

configure_file("${CMAKE_SOURCE_DIR}/python/mlx_fused/_build.py.in" _build.py @ONLY)
install(TARGETS _ext LIBRARY DESTINATION mlx_fused)
install(FILES "${CMAKE_CURRENT_BINARY_DIR}/_build.py" DESTINATION mlx_fused)
