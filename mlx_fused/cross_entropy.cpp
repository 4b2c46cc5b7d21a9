#include "mlx_fused/cross_entropy.h"

#include <algorithm>
#include <iterator>
#include <limits>
#include <stdexcept>

#include "mlx/ops.h"
#include "mlx/transforms.h"
#include "mlx_fused/backend/cpu/cross_entropy.h"
#include "mlx_fused/composed.h"
#include "mlx_fused/projection.h"
#include "mlx_fused/routing.h"
#include "mlx_fused/workload.h"

namespace mlx_fused {

namespace {

// Which rows count.
mx::array counted(const mx::array& targets, mx::Stream s) {
  return mx::not_equal(targets, mx::array(cpu::ignored, mx::int64), s);
}

// The losses in MLX's own operations. One whose target is no word is NaN.
mx::array composed_losses(const Arrays& inputs, const LossCall& call, const Products& products) {
  auto s = products.stream;
  auto& targets = inputs.back();
  auto counts = counted(targets, s);
  Arrays of_head(inputs.begin(), inputs.end() - 1);
  // Else a NaN in a row that does not count would reach the gradients.
  of_head[0] = mx::where(mx::expand_dims(counts, -1, s), of_head[0], mx::array(0, of_head[0].dtype()), s);
  auto logits = composed::project(of_head, call.head, products)[0];
  logits = mx::astype(logits, mx::promote_types(logits.dtype(), mx::float32), s);
  auto number = [&](float value) { return mx::array(value, logits.dtype()); };
  if (call.softcap != 0) {
    logits = mx::multiply(number(call.softcap), mx::tanh(mx::divide(logits, number(call.softcap), s), s), s);
  }
  int words = logits.shape(-1);
  auto is_word =
      mx::logical_and(mx::greater_equal(targets, mx::array(0), s), mx::less(targets, mx::array(words), s), s);
  auto places = mx::expand_dims(mx::where(is_word, targets, mx::array(0, mx::int64), s), -1, s);
  auto of_target = mx::squeeze(mx::take_along_axis(logits, places, -1, s), -1, s);
  of_target = mx::where(is_word, of_target, number(std::numeric_limits<float>::quiet_NaN()), s);
  auto losses = mx::subtract(
      mx::logsumexp(logits, -1, false, s), mx::multiply(number(1 - call.smoothing), of_target, s), s);
  if (call.smoothing != 0) {
    auto mean = mx::mean(logits, -1, false, s);
    losses = mx::subtract(losses, mx::multiply(number(call.smoothing), mean, s), s);
  }
  return mx::where(counts, losses, number(0), s);
}

// The same as a function of the inputs.
Function losses_of(const LossCall& call, mx::Stream s) {
  return [=](const Arrays& inputs) { return Arrays{composed_losses(inputs, call, Products(s))}; };
}

}  // namespace

mx::array cross_entropy(
    Arrays inputs,
    LossCall call,
    const std::optional<mx::array>& mask,
    const std::optional<int64_t>& ignore_index,
    const std::optional<std::string>& route,
    mx::Stream s) {
  auto& targets = inputs.back();
  auto given = mx::astype(targets, mx::int64, s);
  targets = given;
  auto ignored = mx::array(cpu::ignored, mx::int64);
  if (ignore_index) {
    targets = mx::where(mx::equal(given, mx::array(*ignore_index, mx::int64), s), ignored, targets, s);
  }
  if (mask) {
    targets = mx::where(*mask, targets, ignored, s);
  }
  Arrays of_head(inputs.begin(), inputs.end() - 1);
  auto slots = input_slots(call.head);
  auto work = workload(of_head, call.head, slots);
  auto device = describe(s.device).kind;
  bool composes = choose_route(Check(call.head.operation), work, s, route) == Route::composed;
  if (composes || device != DeviceInfo::cpu) {
    return composed_losses(inputs, call, Products(s, route));
  }
  for (size_t i = 0; i < slots.size(); ++i) {
    auto role = slots[i].role;
    bool of_adapter = role == Role::lora_a || role == Role::lora_b;
    bool of_group = role == Role::group_scales || role == Role::group_biases;
    if (of_adapter) {
      inputs[i] = mx::astype(inputs[i], mx::float32, s);
    } else if (of_group && mx::issubdtype(inputs[i].dtype(), mx::floating)) {
      inputs[i] = mx::astype(inputs[i], work.promoted[0], s);
    }
  }
  return CrossEntropy::of(inputs, call, s)[0];
}

Arrays CrossEntropy::of(const Arrays& inputs, const LossCall& call, mx::Stream s, bool makes_dx) {
  auto primitive = std::make_shared<CrossEntropy>(s, call, makes_dx);
  auto shapes = primitive->output_shapes(inputs);
  return mx::array::make_arrays(shapes, {mx::float32, mx::float32, inputs[0].dtype()}, primitive, inputs);
}

void CrossEntropy::eval_gpu(const Arrays&, Arrays&) {
  throw std::runtime_error("[CrossEntropy] There are no kernels for GPUs.");
}

// mx.compile may give it other shapes than it was made with.
std::vector<mx::Shape> CrossEntropy::output_shapes(const Arrays& inputs) {
  auto& x = inputs[0];
  Check check(call_.head.operation);
  check.shape({"targets"}, inputs.back(), {x.shape(0), x.shape(1)});
  check_in_features(check, inputs, call_.head);
  return {inputs.back().shape(), inputs.back().shape(), inputs[0].shape()};
}

Function CrossEntropy::composed() {
  return [losses = losses_of(call_, stream()), s = stream()](const Arrays& inputs) {
    auto of_x = [&](const Arrays& x) {
      auto all = inputs;
      all[0] = x[0];
      return losses(all);
    };
    auto of = losses(inputs)[0];
    auto dx = mx::vjp(of_x, {inputs[0]}, {mx::ones_like(of, s)}).second[0];
    // Where this runs, the gradient is composed too, and nothing reads the logarithms. NaN would show it.
    return Arrays{of, mx::full_like(of, std::numeric_limits<float>::quiet_NaN(), s), dx};
  };
}

Arrays CrossEntropy::vjp(
    const Arrays& primals, const Arrays& cotangents, const std::vector<int>& argnums, const Arrays& outputs) {
  int targets = primals.size() - 1;
  std::vector<int> of_head;
  std::ranges::copy_if(argnums, std::back_inserter(of_head), [=](int i) { return i != targets; });
  Arrays wanted;
  auto slots = wanted_gradients(call_.head, of_head);
  // A custom function that consumes this output may return a cotangent of another dtype.
  auto cotangent = mx::astype(cotangents[0], mx::float32, stream());
  if (!slots || !is_zero(cotangents[2])) {  // of a second derivative
    wanted = FusedPrimitive::vjp(primals, cotangents, of_head, outputs);
  } else if (*slots == Slots{{Role::input}} && has_dx(outputs)) {
    wanted = {CrossEntropyScaled::of({cotangent, outputs[2], primals.back()}, stream())};
  } else {
    Arrays inputs = {cotangent, outputs[1]};
    inputs.insert(inputs.end(), primals.begin(), primals.end());
    wanted = CrossEntropyGrad::of(inputs, call_, *slots, stream());
  }
  Arrays grads;
  auto next = wanted.begin();
  for (int i : argnums) {
    grads.push_back(i == targets ? mx::zeros_like(primals[i], stream()) : *next++);
  }
  return grads;
}

bool CrossEntropy::has_dx(const Arrays& outputs) {
  if (call_.smoothing != 0 || call_.head.has_adapters()) {
    return false;
  }
  if (outputs[2].status() == mx::array::Status::unscheduled) {
    makes_dx_ = true;
    return true;
  }
  return outputs[2].buffer_size() >= outputs[2].nbytes();  // else evaluated before a gradient was asked for
}

mx::array CrossEntropyScaled::of(const Arrays& inputs, mx::Stream s) {
  return {inputs[1].shape(), inputs[1].dtype(), std::make_shared<CrossEntropyScaled>(s), inputs};
}

void CrossEntropyScaled::eval_gpu(const Arrays&, Arrays&) {
  throw std::runtime_error("[CrossEntropyScaled] There are no kernels for GPUs.");
}

Function CrossEntropyScaled::composed() {
  return [s = stream()](const Arrays& inputs) {
    auto of_rows = [&](const mx::array& a) { return mx::expand_dims(a, -1, s); };
    auto dx = mx::astype(mx::multiply(of_rows(inputs[0]), inputs[1], s), inputs[1].dtype(), s);
    return Arrays{mx::where(of_rows(counted(inputs[2], s)), dx, mx::array(0, dx.dtype()), s)};
  };
}

Arrays CrossEntropyGrad::of(const Arrays& inputs, const LossCall& call, const Slots& wanted, mx::Stream s) {
  auto primitive = std::make_shared<CrossEntropyGrad>(s, call, wanted);
  Arrays of_head(inputs.begin() + 2, inputs.end());
  Operands operands(of_head, input_slots(call.head));
  std::vector<mx::Dtype> dtypes;
  for (auto [role, segment] : wanted) {
    dtypes.push_back(operands.get(role).dtype());
  }
  return mx::array::make_arrays(primitive->output_shapes(inputs), dtypes, primitive, inputs);
}

void CrossEntropyGrad::eval_gpu(const Arrays&, Arrays&) {
  throw std::runtime_error("[CrossEntropyGrad] There are no kernels for GPUs.");
}

std::vector<mx::Shape> CrossEntropyGrad::output_shapes(const Arrays& inputs) {
  Arrays of_head(inputs.begin() + 2, inputs.end());
  Operands operands(of_head, input_slots(call_.head));
  std::vector<mx::Shape> shapes;
  for (auto [role, segment] : wanted_) {
    shapes.push_back(operands.get(role).shape());
  }
  return shapes;
}

Function CrossEntropyGrad::composed() {
  return [losses = losses_of(call_, stream()), slots = input_slots(call_.head), wanted = wanted_](
             const Arrays& inputs) {
    Arrays of(inputs.begin() + 2, inputs.end()), primals;
    std::vector<size_t> places;
    for (auto& slot : wanted) {
      places.push_back(std::ranges::find(slots, slot) - slots.begin());
      primals.push_back(of[places.back()]);
    }
    auto function = [&](const Arrays& args) {
      auto all = of;
      for (size_t i = 0; i < args.size(); ++i) {
        all[places[i]] = args[i];
      }
      return losses(all);
    };
    return mx::vjp(function, primals, {inputs[0]}).second;
  };
}

}  // namespace mlx_fused
