# The Metal kernels: compiled to a metallib where Xcode is, and always as a source that the device can
# compile.

file(GLOB METAL_SOURCES CONFIGURE_DEPENDS "${CMAKE_SOURCE_DIR}/metal/*.metal")
file(GLOB METAL_HEADERS CONFIGURE_DEPENDS "${CMAKE_SOURCE_DIR}/metal/*.h")

# A source of their own for quantized weights: a device compiles it for one format at a time.
set(METAL_DENSE ${METAL_SOURCES})
set(METAL_QUANTIZED ${METAL_SOURCES})
list(FILTER METAL_DENSE EXCLUDE REGEX "/quantized_[^/]*$")
list(FILTER METAL_QUANTIZED INCLUDE REGEX "/quantized_[^/]*$")

function(mlx_fused_flatten NAME)
  add_custom_command(
    OUTPUT ${NAME}
    COMMAND "${Python_EXECUTABLE}" "${CMAKE_CURRENT_FUNCTION_LIST_DIR}/flatten_metal.py" ${NAME}
            ${MLX_INCLUDE_DIRS} -- ${ARGN}
    DEPENDS ${ARGN} ${METAL_HEADERS} "${CMAKE_CURRENT_FUNCTION_LIST_DIR}/flatten_metal.py"
    VERBATIM)
  install(FILES "${CMAKE_CURRENT_BINARY_DIR}/${NAME}" DESTINATION mlx_fused)
endfunction()
mlx_fused_flatten(kernels.metal ${METAL_DENSE})
mlx_fused_flatten(quantized_kernels.metal ${METAL_QUANTIZED})
add_custom_target(mlx_fused_metal_source ALL DEPENDS kernels.metal quantized_kernels.metal)

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
