# Cross-compiles for arm64 macOS with the clang of the ziglang package. wheel.py sets the environment.
set(CMAKE_SYSTEM_NAME Darwin)
set(CMAKE_SYSTEM_PROCESSOR arm64)
set(CMAKE_TRY_COMPILE_TARGET_TYPE STATIC_LIBRARY)
set(CMAKE_EXPORT_COMPILE_COMMANDS ON)
set(CMAKE_USER_MAKE_RULES_OVERRIDE "${CMAKE_CURRENT_LIST_DIR}/rules.cmake")

set(CMAKE_CXX_COMPILER "$ENV{ZIG}" c++ -target aarch64-macos.14.0)
# Finding these out would link a program, and zig would compile its libc++ for that.
set(CMAKE_CXX_COMPILER_ID_RUN 1)
set(CMAKE_CXX_COMPILER_ID Clang)
set(CMAKE_CXX_COMPILER_VERSION 22)
set(CMAKE_CXX_COMPILER_FRONTEND_VARIANT GNU)
set(CMAKE_CXX_STANDARD_COMPUTED_DEFAULT 17)
# zig's libc++ headers come without availability, but a wheel must keep to what macOS 14's libc++ exports.
set(CMAKE_CXX_FLAGS_INIT
    "-U_LIBCPP_HAS_VENDOR_AVAILABILITY_ANNOTATIONS -D_LIBCPP_HAS_VENDOR_AVAILABILITY_ANNOTATIONS=1 -isystem \"${CMAKE_CURRENT_LIST_DIR}/include\""
)
