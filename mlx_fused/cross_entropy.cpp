#include "mlx_fused/cross_entropy.h"

#include <algorithm>
#include <iterator>
#include <limits>
#include <stdexcept>

#include "mlx/ops.h"
#include "mlx/transforms.h"
#include "mlx_fused/backend/cpu/cross_entropy.h"
#include "mlx_fused/composed_cross_entropy.h"
#include "mlx_fused/computed.h"
#include "mlx_fused/projection.h"
#include "mlx_fused/routing.h"
#include "mlx_fused/workload.h"

namespace mlx_fused {

namespace {

// The losses in MLX's own operations, as a function of the inputs.
Function losses_of(const LossCall& call, mx::Stream s) {
  return [=](const Arrays& inputs) { return Arrays{composed::cross_entropy(inputs, call, Products(s))}; };
}

// The gradients in MLX's own operations, of blocks of logits.
class BlockedCrossEntropyGrad : public Computed<CrossEntropyGrad> {
 public:
  BlockedCrossEntropyGrad(size_t inputs, mx::Stream s, LossCall call, Slots wanted, BlockSize size)
      : Computed(inputs, s, std::move(call), std::move(wanted)), size_(size) {}

  static Arrays of(
      const Arrays& inputs, const LossCall& call, const Slots& wanted, BlockSize size, mx::Stream s) {
    auto grads = composed::cross_entropy_grad_by_blocks(inputs, call, wanted, size, s);
    return made<BlockedCrossEntropyGrad>(inputs, grads, s, call, wanted, size);
  }
  DEFINE_NAME(BlockedLinearCrossEntropyGrad)

 protected:
  Arrays apply(const Arrays& inputs) override {
    return of(inputs, call_, wanted_, size_, stream());
  }

 private:
  const BlockSize size_;
};

// The losses in MLX's own operations, of blocks of logits.
class BlockedCrossEntropy : public Computed<CrossEntropy> {
 public:
  BlockedCrossEntropy(size_t inputs, mx::Stream s, LossCall call, bool makes_dx, BlockSize size)
      : Computed(inputs, s, std::move(call), makes_dx), size_(size) {}

  static Arrays of(
      const Arrays& inputs, const LossCall& call, BlockSize size, mx::Stream s, bool makes_dx = false) {
    auto outputs = composed::cross_entropy_by_blocks(inputs, call, makes_dx, size, s);
    if (!makes_dx) {
      mx::array nothing(0, inputs[0].dtype());
      outputs.push_back(mx::broadcast_to(nothing, inputs[0].shape(), s));  // no gradient yet, and no memory
    }
    return made<BlockedCrossEntropy>(inputs, outputs, s, call, makes_dx, size);
  }
  DEFINE_NAME(BlockedLinearCrossEntropy)

 protected:
  Arrays apply(const Arrays& inputs) override {
    return of(inputs, call_, size_, stream(), makes_dx_);
  }
  bool has_dx(const Arrays& outputs) override {
    if (!can_make_dx() || outputs[0].status() != mx::array::Status::unscheduled) {
      return false;
    }
    makes_dx_ = true;
    auto inputs = without_outputs(outputs[0].inputs());
    compute_by(composed::cross_entropy_by_blocks(inputs, call_, true, size_, stream()), outputs);
    return true;
  }
  Arrays gradients(const Arrays& inputs, const Slots& wanted) override {
    return BlockedCrossEntropyGrad::of(inputs, call_, wanted, size_, stream());
  }
  mx::array scaled(const Arrays& inputs) override {
    return composed::cross_entropy_scaled(inputs[0], inputs[1], inputs[2], stream());
  }

 private:
  const BlockSize size_;
};

}  // namespace

mx::array cross_entropy(
    Arrays inputs,
    LossCall call,
    const std::optional<mx::array>& mask,
    const std::optional<int64_t>& ignore_index,
    const std::optional<std::string>& route,
    const std::optional<BlockSize>& blocks,
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
  auto chosen = choose_route(Check(call.head.operation), work, s, route);
  bool by_blocks = blocks || describe(s.device).kind != DeviceInfo::cpu;
  if (by_blocks ? route == "composed" || targets.size() == 0 : chosen == Route::composed) {
    return composed::cross_entropy(inputs, call, Products(s, route));
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
  if (by_blocks) {
    return BlockedCrossEntropy::of(inputs, call, blocks.value_or(usual_block), s)[0];
  }
  return CrossEntropy::of(inputs, call, s)[0];
}

Arrays CrossEntropy::of(const Arrays& inputs, const LossCall& call, mx::Stream s, bool makes_dx) {
  auto primitive = std::make_shared<CrossEntropy>(s, call, makes_dx);
  auto shapes = primitive->output_shapes(inputs);
  return mx::array::make_arrays(shapes, {mx::float32, mx::float32, inputs[0].dtype()}, primitive, inputs);
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
    wanted = {scaled({cotangent, outputs[2], primals.back()})};
  } else {
    Arrays inputs = {cotangent, outputs[1]};
    inputs.insert(inputs.end(), primals.begin(), primals.end());
    wanted = gradients(inputs, *slots);
  }
  Arrays grads;
  auto next = wanted.begin();
  for (int i : argnums) {
    grads.push_back(i == targets ? mx::zeros_like(primals[i], stream()) : *next++);
  }
  return grads;
}

bool CrossEntropy::can_make_dx() const {
  return call_.smoothing == 0 && !call_.head.has_adapters();
}

bool CrossEntropy::has_dx(const Arrays& outputs) {
  if (!can_make_dx()) {
    return false;
  }
  if (outputs[2].status() == mx::array::Status::unscheduled) {
    makes_dx_ = true;
    return true;
  }
  return outputs[2].buffer_size() >= outputs[2].nbytes();  // else evaluated before a gradient was asked for
}

Arrays CrossEntropy::gradients(const Arrays& inputs, const Slots& wanted) {
  return CrossEntropyGrad::of(inputs, call_, wanted, stream());
}

mx::array CrossEntropy::scaled(const Arrays& inputs) {
  return CrossEntropyScaled::of(inputs, stream());
}

mx::array CrossEntropyScaled::of(const Arrays& inputs, mx::Stream s) {
  return {inputs[1].shape(), inputs[1].dtype(), std::make_shared<CrossEntropyScaled>(s), inputs};
}

Function CrossEntropyScaled::composed() {
  return [s = stream()](const Arrays& inputs) {
    return Arrays{composed::cross_entropy_scaled(inputs[0], inputs[1], inputs[2], s)};
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
