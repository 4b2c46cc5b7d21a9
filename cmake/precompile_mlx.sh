# Precompiles the header of what mx.compile makes for CPUs: sh cmake/precompile_mlx.sh PYTHON
# MLX has g++ compile each of its kernels, with these options, and reading the header takes most of the time.
[ "$(uname)" = Linux ] && g++ --version >/dev/null 2>&1 || exit 0
include=$("$1" -c 'import mlx.core, os; print(os.path.dirname(mlx.core.__file__) + "/include")')
header=$include/mlx/backend/cpu/compiled_preamble.h
g++ -std=c++17 -O3 -Wall -w -fPIC -I "$include" -x c++-header "$header" -o "$header.gch"
