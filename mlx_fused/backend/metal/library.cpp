#include "mlx_fused/backend/metal/library.h"

#include <dlfcn.h>

#include <array>
#include <filesystem>
#include <fstream>
#include <mutex>
#include <sstream>
#include <stdexcept>
#include <string>
#include <unordered_map>

namespace mlx_fused::metal {

namespace {

std::filesystem::path extension_dir() {
  Dl_info info;
  if (!dladdr(reinterpret_cast<void*>(&extension_dir), &info)) {
    throw std::runtime_error("[mlx_fused] Cannot find the folder that the extension was loaded from.");
  }
  return std::filesystem::path(info.dli_fname).parent_path();
}

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

MTL::ComputePipelineState* load(mlx::core::metal::Device& device, const Kernel& kernel) {
  mlx::core::metal::MTLFCList constants;
  std::array<bool, 8> values;
  auto specialized = kernel.name();
  for (size_t i = 0; i < values.size(); ++i) {
    if (kernel.constants.given >> i & 1) {
      values[i] = kernel.constants.values >> i & 1;
      constants.emplace_back(&values[i], MTL::DataType::DataTypeBool, i);
      specialized += values[i] ? "_1" : "_0";
    }
  }
  auto format = std::string(kernel.library_format());
  return device.get_kernel(kernel.name(), library(device, format), specialized, constants);
}

}  // namespace

MTL::ComputePipelineState* pipeline(mlx::core::metal::Device& device, const Kernel& kernel) {
  static std::mutex mutex;
  static std::unordered_map<uint64_t, MTL::ComputePipelineState*> loaded;
  std::lock_guard lock(mutex);
  auto& found = loaded[kernel.key()];
  if (!found) {
    found = load(device, kernel);
  }
  return found;
}

}  // namespace mlx_fused::metal
