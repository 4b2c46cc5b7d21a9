// Runs the primitives' eval_gpu on Linux: launches go to a recorder, and from there to the simulator.
#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <stdexcept>
#include <string_view>

#include "mlx/allocator.h"
#include "mlx/backend/metal/device.h"
#include "mlx/transforms.h"
#include "mlx_fused/activate.h"
#include "mlx_fused/attention.h"
#include "mlx_fused/cross_entropy.h"
#include "mlx_fused/embedding.h"
#include "mlx_fused/norm.h"
#include "mlx_fused/projection.h"
#include "mlx_fused/rope.h"
#include "mlx_fused/routing.h"

namespace mx = mlx::core;
namespace nb = nanobind;

namespace mlx::core::metal {

Device& device(mlx::core::Device) {
  static Device fake;
  return fake;
}

CommandEncoder& get_command_encoder(Stream) {
  static CommandEncoder recorder;
  return recorder;
}

}  // namespace mlx::core::metal

namespace mlx_fused {

// The CPU takes no part.
#define NOT_ON_CPU(Primitive)                                               \
  void Primitive::eval_cpu(const Arrays&, Arrays&) {                        \
    throw std::runtime_error("[" #Primitive "] was evaluated on the CPU."); \
  }
NOT_ON_CPU(Projection)
NOT_ON_CPU(ProjectionGrad)
NOT_ON_CPU(Activate)
NOT_ON_CPU(ActivateGrad)
NOT_ON_CPU(Embedding)
NOT_ON_CPU(RMSNorm)
NOT_ON_CPU(RMSNormGrad)
NOT_ON_CPU(Attention)
NOT_ON_CPU(AttentionGrad)
NOT_ON_CPU(Rope)
NOT_ON_CPU(CrossEntropy)
NOT_ON_CPU(CrossEntropyScaled)
NOT_ON_CPU(CrossEntropyGrad)

void check_cpu_settings() {}

// Routing takes the CPU for a GPU if told so: without Metal MLX has no stream on one.
static bool on_metal = false;
DeviceInfo describe_metal(mx::Device device);
DeviceInfo describe(mx::Device device) {
  return describe_metal(on_metal ? mx::Device::gpu : device);
}

}  // namespace mlx_fused

namespace {

// A launch as msl_sim takes it, and the memory that it is given: (address, bytes, bytes of an element,
// whether it is written).
nb::tuple describe(const mx::metal::CommandEncoder::Launch& launch) {
  auto extent = [](const MTL::Size& s) { return nb::make_tuple(s.width, s.height, s.depth); };
  nb::dict constants, dict;
  for (auto [index, value] : launch.pipeline.constants) {
    constants[nb::int_(index)] = value;
  }
  nb::list buffers, bytes, memory;
  for (auto& [index, whole, offset, is_output] : launch.buffers) {
    auto address = reinterpret_cast<uintptr_t>(const_cast<mx::array&>(whole).buffer().raw_ptr());
    buffers.append(nb::make_tuple(index, std::to_string(address), offset));
    memory.append(nb::make_tuple(address, whole.buffer_size(), whole.itemsize(), is_output));
  }
  for (auto& [index, value] : launch.bytes) {
    bytes.append(nb::make_tuple(index, nb::bytes(value.data(), value.size())));
  }
  dict["kernel"] = launch.pipeline.kernel;
  dict["library"] = launch.pipeline.library;
  dict["constants"] = constants;
  dict["buffers"] = buffers;
  dict["bytes"] = bytes;
  dict["grid"] = extent(launch.grid);
  dict["threadgroup"] = extent(launch.threadgroup);
  return nb::make_tuple(dict, memory);
}

bool is_ours(const mx::array& a) {
  return a.has_primitive() && std::string_view(a.primitive().name()).starts_with("Fused");
}

// Evaluates by their eval_gpu the nodes of ours that `a` is made of, and `a` if it is one; `simulate` runs
// each launch. Returns how many.
int evaluate(mx::array a, const nb::callable& simulate) {
  if (a.status() != mx::array::Status::unscheduled || !a.has_primitive()) {
    return 0;
  }
  int launches = 0;
  auto inputs = a.inputs();
  for (auto& input : inputs) {
    launches += evaluate(input, simulate);
  }
  if (!is_ours(a)) {
    return launches;
  }
  auto outputs = a.outputs();
  mx::eval(inputs);
  auto& encoder = mx::metal::get_command_encoder(a.primitive().stream());
  encoder.launches.clear();
  encoder.temporaries.clear();
  a.primitive().eval_gpu(inputs, outputs);
  for (auto& launch : encoder.launches) {
    simulate(describe(launch));
  }
  for (auto& out : outputs) {
    out.set_status(mx::array::Status::available);
  }
  a.detach();
  return launches + static_cast<int>(encoder.launches.size());
}

}  // namespace

NB_MODULE(metal_host, m) {
  m.def("eval_gpu", &evaluate);
  m.def("set_on_metal", [](bool on) { mlx_fused::on_metal = on; });
}
