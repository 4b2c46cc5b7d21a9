# zig's tools take other options than Apple's.
set(CMAKE_CXX_CREATE_STATIC_LIBRARY "\"$ENV{ZIG}\" ar rcs <TARGET> <OBJECTS>")
set(CMAKE_CXX_CREATE_SHARED_MODULE
    "\"$ENV{PYTHON}\" -m macos.link \"$ENV{MACOS_MLX}\" <TARGET> <CMAKE_CXX_COMPILER> <OBJECTS> <LINK_LIBRARIES>"
)
