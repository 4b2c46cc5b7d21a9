# The Metal kernels: compiled to a metallib where Xcode is, and always as a source that the device can
# compile.

file(GLOB METAL_SOURCES CONFIGURE_DEPENDS "${CMAKE_SOURCE_DIR}/metal/*.metal")
file(GLOB METAL_HEADERS CONFIGURE_DEPENDS "${CMAKE_SOURCE_DIR}/metal/*.h")

add_custom_command(
  OUTPUT kernels.metal
  COMMAND "${Python_EXECUTABLE}" "${CMAKE_CURRENT_LIST_DIR}/flatten_metal.py" kernels.metal
          ${MLX_INCLUDE_DIRS} -- ${METAL_SOURCES}
  DEPENDS ${METAL_SOURCES} ${METAL_HEADERS} "${CMAKE_CURRENT_LIST_DIR}/flatten_metal.py"
  VERBATIM)
add_custom_target(mlx_fused_metal_source ALL DEPENDS kernels.metal)
install(FILES "${CMAKE_CURRENT_BINARY_DIR}/kernels.metal" DESTINATION mlx_fused)

# Run it, for the command line tools have xcrun without it, and Xcode 26 a stub of it.
execute_process(
  COMMAND xcrun -sdk macosx metal --version
  RESULT_VARIABLE METAL_COMPILER_MISSING
  OUTPUT_QUIET ERROR_QUIET)
if(NOT METAL_COMPILER_MISSING)
  mlx_build_metallib(
    TARGET
    mlx_fused_metallib
    TITLE
    mlx_fused
    SOURCES
    ${METAL_SOURCES}
    INCLUDE_DIRS
    ${MLX_INCLUDE_DIRS}
    "${CMAKE_SOURCE_DIR}/metal"
    DEPS
    ${METAL_HEADERS}
    OUTPUT_DIRECTORY
    "${CMAKE_CURRENT_BINARY_DIR}"
    DEPLOYMENT_TARGET
    14.0)
  add_dependencies(_ext mlx_fused_metallib)
  install(FILES "${CMAKE_CURRENT_BINARY_DIR}/mlx_fused.metallib" DESTINATION mlx_fused)
else()
  message(STATUS "No Metal compiler: the kernels will be compiled by the device, once per process")
endif()
