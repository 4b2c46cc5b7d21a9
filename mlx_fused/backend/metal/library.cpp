#include "mlx_fused/backend/metal/library.h"

#include <dlfcn.h>

#include <filesystem>
#include <fstream>
#include <sstream>
#include <stdexcept>

namespace mlx_fused::metal {

namespace {

std::filesystem::path extension_dir() {
  Dl_info info;
  if (!dladdr(reinterpret_cast<void*>(&extension_dir), &info)) {
    throw std::runtime_error("[mlx_fused] Cannot find the folder that the extension was loaded from.");
  }
  return std::filesystem::path(info.dli_fname).parent_path();
}

}  // namespace

MTL::Library* library(mlx::core::metal::Device& device, const std::string& format) {
  static const auto dir = extension_dir();
  static const bool compiled = std::filesystem::exists(dir / "mlx_fused.metallib");
  if (compiled) {
    return device.get_library("mlx_fused", (dir / "mlx_fused.metallib").string());
  }
  return device.get_library("mlx_fused_" + format, [&] {
    std::ifstream file(dir / "kernels.metal");
    if (!file) {
      throw std::runtime_error(
          "[mlx_fused] Neither mlx_fused.metallib nor kernels.metal is in " + dir.string() +
          ". Fix: reinstall mlx-fused.");
    }
    std::stringstream source;
    source << "#define MLX_FUSED_FORMAT " << format << "\n#define MLX_FUSED_FORMAT_" << format << "\n";
    source << file.rdbuf();
    return source.str();
  });
}

}  // namespace mlx_fused::metal
