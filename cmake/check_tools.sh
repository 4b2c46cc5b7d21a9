# Stops before a build that cannot succeed and says what to install: sh cmake/check_tools.sh PYTHON
python=$1
missing=""
lacks() { missing="$missing${missing:+, }$1"; }

version=$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null)
case $version in
3.1[0-4])
  "$python" -c 'import ensurepip, venv' 2>/dev/null || lacks "the venv module of $python"
  "$python" -c 'import os, sysconfig; os.stat(sysconfig.get_path("include") + "/Python.h")' 2>/dev/null ||
    lacks "the headers of $python"
  ;;
# MLX has wheels for these.
"") lacks "Python 3.10 to 3.14 ($python does not run; another: make PYTHON=...)" ;;
*) lacks "Python 3.10 to 3.14 ($python is $version; another: make PYTHON=...)" ;;
esac
compiler=${CXX:-c++}
printf '#include <span>\n#include "mlx_fused/backend/cpu/projection.h"\nstd::span<mlx_fused::cpu::half> values;\n' |
  $compiler -std=c++20 -fsyntax-only -I. -x c++ - 2>/dev/null ||
  lacks "a compiler of C++20 with _Float16: g++ 12, clang 15 or newer ($compiler is none; another: make CXX=...)"
git --version >/dev/null 2>&1 || lacks "git"

[ -z "$missing" ] && exit
if [ "$(uname)" = Darwin ]; then
  fix="xcode-select --install, and Python from python.org"
else
  fix="on Debian: apt install python3-venv python3-dev g++ git"
fi
echo "mlx-fused needs $missing. Install: $fix" >&2
exit 1
