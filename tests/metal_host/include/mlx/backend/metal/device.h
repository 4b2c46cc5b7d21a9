// In place of MLX's header of this name: what eval.cpp and library.cpp use of it, recording launches.
#pragma once

#include <cstring>
#include <functional>
#include <map>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "mlx/array.h"
#include "mlx/device.h"
#include "mlx/stream.h"

namespace MTL {

enum DataType : unsigned { DataTypeBool = 53 };
enum GPUFamily : long { GPUFamilyApple7 = 1007 };

struct Device {
  bool supportsFamily(GPUFamily) {
    return true;
  }
};

struct Size {
  size_t width, height, depth;
};

struct Library {
  std::string name;
};

// A kernel with its function constants.
struct ComputePipelineState {
  std::string kernel, library;
  std::map<int, bool> constants;
};

}  // namespace MTL

namespace mlx::core::metal {

using MTLFCList = std::vector<std::tuple<const void*, MTL::DataType, size_t>>;

class Device {
 public:
  MTL::Device* mtl_device() {
    return &device_;
  }
  const std::string& get_architecture() const {
    return architecture_;
  }
  int get_architecture_gen() const {
    return 14;
  }
  MTL::Library* get_library(const std::string& name, const std::string& = "") {
    return &libraries_.try_emplace(name, MTL::Library{name}).first->second;
  }
  MTL::Library* get_library(const std::string& name, const std::function<std::string()>&) {
    return get_library(name);
  }
  // As MLX does, keeps kernels by their hash name.
  MTL::ComputePipelineState* get_kernel(
      const std::string& name,
      MTL::Library* library,
      const std::string& hash_name,
      const MTLFCList& constants) {
    MTL::ComputePipelineState kernel{name, library->name, {}};
    for (auto& [value, type, index] : constants) {
      kernel.constants[static_cast<int>(index)] = *static_cast<const bool*>(value);
    }
    return &kernels_.try_emplace({library->name, hash_name}, kernel).first->second;
  }

 private:
  MTL::Device device_;
  std::string architecture_ = "applegpu_g14s";
  std::map<std::string, MTL::Library> libraries_;
  std::map<std::pair<std::string, std::string>, MTL::ComputePipelineState> kernels_;
};

// Sets arrays and bytes as MLX's does, and writes down what is dispatched.
class CommandEncoder {
 public:
  struct Buffer {
    int index;
    array whole;
    int64_t offset;  // bytes from the start of its memory
    bool is_output;
  };
  struct Launch {
    MTL::ComputePipelineState pipeline;
    std::vector<Buffer> buffers;
    std::vector<std::pair<int, std::string>> bytes;
    MTL::Size grid, threadgroup;
  };

  void add_temporary(array a) {
    temporaries.push_back(std::move(a));
  }
  void set_compute_pipeline_state(MTL::ComputePipelineState* pipeline) {
    next_ = {*pipeline, {}, {}, {}, {}};
  }
  void set_input_array(const array& a, int index, int64_t offset = 0) {
    next_.buffers.push_back({index, a, a.offset() + offset, false});
  }
  void set_output_array(array& a, int index, int64_t offset = 0) {
    next_.buffers.push_back({index, a, a.offset() + offset, true});
  }
  template <typename T>
  void set_bytes(const T& value, int index) {
    next_.bytes.emplace_back(index, std::string(reinterpret_cast<const char*>(&value), sizeof(T)));
  }
  void dispatch_threadgroups(MTL::Size grid, MTL::Size threadgroup) {
    next_.grid = grid;
    next_.threadgroup = threadgroup;
    launches.push_back(next_);
  }

  std::vector<Launch> launches;
  std::vector<array> temporaries;

 private:
  Launch next_;
};

Device& device(mlx::core::Device);
CommandEncoder& get_command_encoder(Stream);

}  // namespace mlx::core::metal
