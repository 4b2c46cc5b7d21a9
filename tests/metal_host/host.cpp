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
#include "mlx_fused/projection.h"
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
void Projection::eval_cpu(const Arrays&, Arrays&) {
  throw std::runtime_error("[Projection] was evaluated on the CPU.");
}

void ProjectionGrad::eval_cpu(const Arrays&, Arrays&) {
  throw std::runtime_error("[ProjectionGrad] was evaluated on the CPU.");
}

void Activate::eval_cpu(const Arrays&, Arrays&) {
  throw std::runtime_error("[Activate] was evaluated on the CPU.");
}

void ActivateGrad::eval_cpu(const Arrays&, Arrays&) {
  throw std::runtime_error("[ActivateGrad] was evaluated on the CPU.");
}

void check_cpu_settings() {}

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

// Evaluates the node of ours that `a` comes from by its eval_gpu; `simulate` runs each launch. Returns how
// many.
int eval_gpu(mx::array a, const nb::callable& simulate) {
  while (!std::string_view(a.primitive().name()).starts_with("Fused")) {
    a = mx::array(a.inputs()[0]);  // a packed weight's gradient is concatenated
  }
  auto inputs = a.inputs();
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
  return static_cast<int>(encoder.launches.size());
}

}  // namespace

NB_MODULE(metal_host, m) {
  m.def("eval_gpu", &eval_gpu);
}
