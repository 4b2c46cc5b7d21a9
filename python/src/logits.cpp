#include <nanobind/nanobind.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/variant.h>

#include <algorithm>
#include <cmath>
#include <string_view>
#include <variant>

#include "mlx/ops.h"
#include "mlx/primitives.h"
#include "mlx_fused/projection.h"
#include "python/src/bindings.h"

namespace mx = mlx::core;
namespace nb = nanobind;
using namespace nb::literals;
using mlx_fused::Arrays;
using mlx_fused::Role;

namespace {

// What mx.compile makes of elementwise operations keeps them private; that they have a form such as a
// softcap's, nothing else tells.
template <auto inputs, auto outputs>
struct Opened {
  friend const Arrays& inner_inputs(const mx::Compiled& p) {
    return p.*inputs;
  }
  friend const Arrays& inner_outputs(const mx::Compiled& p) {
    return p.*outputs;
  }
};
const Arrays& inner_inputs(const mx::Compiled& p);
const Arrays& inner_outputs(const mx::Compiled& p);
template struct Opened<&mx::Compiled::inputs_, &mx::Compiled::outputs_>;

// Why the logits are not those of a head, with a scale and a softcap.
struct Unknown {
  std::string reason;
};

bool is_one_of(std::string_view name, std::initializer_list<std::string_view> names) {
  return std::ranges::find(names, name) != names.end();
}

// Walks a graph from logits back to the product that made them.
class Reader {
 public:
  explicit Reader(const mx::array& logits)
      : at_(logits), words_(at_.ndim() ? at_.shape(-1) : 0), size_(at_.size()) {}

  // softcap tanh(factor y), or factor y.
  mx::array product() {
    while (!is_product()) {
      step();
    }
    if (at_.size() != size_ || at_.shape(-1) != words_) {
      throw Unknown{"its logits are more than a head's outputs"};
    }
    return at_;
  }

  float scale() const {
    return softcap_ ? *softcap_ * factor_ : factor_;
  }

  std::optional<float> softcap() const {
    return softcap_ ? std::optional<float>(std::abs(*softcap_)) : std::nullopt;
  }

 private:
  bool is_product() {
    if (!at_.has_primitive()) {
      throw Unknown{"its logits were evaluated, or made by a transformation"};
    }
    return dynamic_cast<mlx_fused::Projection*>(&at_.primitive()) ||
           is_one_of(at_.primitive().name(), {"Matmul", "AddMM", "QuantizedMatmul"});
  }

  void step() {
    std::string_view name = at_.primitive().name();
    if (name == "Multiply" || name == "Divide") {
      auto of = inputs();
      bool is_right = number(of[1]).has_value();
      auto value = number(of[is_right]);
      if (!value || *value == 0 || !std::isfinite(*value) || (name == "Divide" && !is_right)) {
        throw Unknown{"its logits are multiplied with an array"};
      }
      factor_ *= name == "Divide" ? 1 / *value : *value;
      at_ = of[!is_right];
    } else if (name == "Tanh" && !softcap_) {
      softcap_ = std::exchange(factor_, 1);
      at_ = inputs()[0];
    } else if (name == "AsType" && at_.dtype() == mx::float32) {
      at_ = inputs()[0];
    } else if (is_one_of(name, {"Reshape", "Flatten", "Unflatten", "ExpandDims", "Squeeze"})) {
      at_ = inputs()[0];
      if (at_.ndim() == 0 || at_.shape(-1) != words_) {
        throw Unknown{"its logits come from an array with other words"};
      }
    } else if (name == "Broadcast") {  // of a function compiled for any shape; `product` compares the sizes
      at_ = inputs()[0];
    } else if (name.starts_with("Compiled")) {
      enter();
    } else {
      throw Unknown{"its logits come from " + std::string(name)};
    }
  }

  // From an output of what mx.compile made to the operation that it stands for.
  void enter() {
    auto& compiled = static_cast<const mx::Compiled&>(at_.primitive());
    auto outputs = at_.outputs();
    auto same = [&](auto& a) { return a.id() == at_.id(); };
    auto place = std::ranges::find_if(outputs, same) - outputs.begin();
    auto& inside = inner_inputs(compiled);
    auto& given = at_.inputs();
    for (size_t i = 0; i < inside.size(); ++i) {
      given_.emplace_back(inside[i].id(), given[i]);
    }
    at_ = inner_outputs(compiled)[place];
  }

  // Those of `at_`; inside of what mx.compile made, where it got them.
  Arrays inputs() const {
    Arrays of = at_.inputs();
    for (auto& a : of) {
      a = outside(a);
    }
    return of;
  }

  // The latest: a compiled function that is called twice has the same arrays inside.
  mx::array outside(const mx::array& a) const {
    auto found =
        std::find_if(given_.rbegin(), given_.rend(), [&](auto& pair) { return pair.first == a.id(); });
    return found == given_.rend() ? a : found->second;
  }

  // The value of a constant; nullopt if it is none.
  std::optional<double> number(mx::array a) const {
    while (a.has_primitive()) {
      std::string_view name = a.primitive().name();
      // To float32, which holds all values of a smaller type.
      bool is_wider = name == "AsType" && a.dtype() == mx::float32 && a.inputs()[0].dtype().size() < 4;
      if (name != "Broadcast" && !is_wider) {
        return std::nullopt;
      }
      a = outside(a.inputs()[0]);
    }
    if (a.size() != 1 || a.is_tracer() || !a.is_available()) {
      return std::nullopt;
    }
    return a.dtype() == mx::float32    ? std::optional<double>(*a.data<float>())
           : a.dtype() == mx::float16  ? std::optional<double>(float(*a.data<mx::float16_t>()))
           : a.dtype() == mx::bfloat16 ? std::optional<double>(float(*a.data<mx::bfloat16_t>()))
           : a.dtype() == mx::int32    ? std::optional<double>(*a.data<int>())
                                       : std::nullopt;
  }

  mx::array at_;
  const int words_;
  const size_t size_;
  double factor_ = 1;
  std::optional<double> softcap_;
  std::vector<std::pair<std::uintptr_t, mx::array>> given_;
};

// The head's input, LinearOperands, scale and softcap.
using Head = std::tuple<mx::array, LinearTuple, float, std::optional<float>>;

std::pair<mx::array, LinearTuple> of_ours(mlx_fused::Projection& head, const mx::array& y) {
  auto call = head.call();
  auto given = y.inputs().begin();
  // A composed projection has more inputs than those of its call.
  Arrays inputs(given, given + input_slots(call).size());
  if (call.norm) {
    std::tie(inputs, call) = normed_before(inputs, call, mlx_fused::Products(head.stream()));
  }
  if (call.segments.size() != 1 || call.segments[0].heads || call.epilogue != mlx_fused::Epilogue{}) {
    throw Unknown{"its logits come from " + call.node + ", which does more than a head"};
  }
  mlx_fused::Operands operands(inputs, input_slots(call));
  auto of = [&](Role role) -> OptionalArray {
    auto* found = operands.find(role);
    return found ? std::optional(*found) : std::nullopt;
  };
  auto& q = call.quantization;
  auto size = [&](int given) { return given ? std::optional(given) : std::nullopt; };
  return {
      operands.get(Role::input),
      {operands.get(Role::weight),
       of(Role::bias),
       of(Role::group_scales),
       of(Role::group_biases),
       q ? size(q->group_size) : std::nullopt,
       q ? size(q->bits) : std::nullopt,
       q ? q->mode : "affine",
       of(Role::lora_a),
       of(Role::lora_b),
       call.segments[0].adapter_scale.value_or(1)}};
}

std::pair<mx::array, LinearTuple> of_mlx(const mx::array& y) {
  std::string_view name = y.primitive().name();
  auto& inputs = y.inputs();
  if (name == "QuantizedMatmul") {
    auto [group_size, bits, mode, transposes] = static_cast<mx::QuantizedMatmul&>(y.primitive()).state();
    static const char* const modes[] = {"affine", "mxfp4", "mxfp8", "nvfp4"};
    if (!transposes || size_t(mode) >= std::size(modes)) {
      throw Unknown{"its logits are no product with rows of a weight"};
    }
    auto biases = inputs.size() > 3 ? std::optional(inputs[3]) : std::nullopt;
    return {
        inputs[0], {inputs[1], {}, inputs[2], biases, group_size, bits, modes[size_t(mode)], {}, {}, 1.0f}};
  }
  auto& transposed = inputs[1];
  bool is_rows = transposed.ndim() == 2 && transposed.has_primitive() &&
                 std::string_view(transposed.primitive().name()) == "Transpose" &&
                 static_cast<mx::Transpose&>(transposed.primitive()).state() == std::vector{1, 0};
  OptionalArray bias;
  if (name == "AddMM") {
    bias = inputs[2];
    while (bias->ndim() != 1 && bias->has_primitive() &&
           std::string_view(bias->primitive().name()) == "Broadcast") {
      bias = mx::array(bias->inputs()[0]);
    }
    auto [alpha, beta] = static_cast<mx::AddMM&>(y.primitive()).state();
    is_rows &= bias->shape() == mx::Shape{y.shape(-1)} && alpha == 1 && beta == 1;
  }
  if (!is_rows) {
    throw Unknown{"its logits are no product with rows of a weight"};
  }
  return {inputs[0], {transposed.inputs()[0], bias, {}, {}, {}, {}, "affine", {}, {}, 1.0f}};
}

std::variant<Head, std::string> head_of(const mx::array& logits) {
  try {
    Reader reader(logits);
    auto y = reader.product();
    auto* ours = dynamic_cast<mlx_fused::Projection*>(&y.primitive());
    auto [x, layer] = ours ? of_ours(*ours, y) : of_mlx(y);
    return Head(x, layer, reader.scale(), reader.softcap());
  } catch (const Unknown& unknown) {
    return unknown.reason;
  }
}

}  // namespace

void bind_logits(nb::module_& m) {
  m.def(
      "head_of",
      &head_of,
      "logits"_a,
      "What unevaluated logits are made from: the head's input, its LinearOperands as a tuple, the scale and "
      "the softcap; or why a model's loss cannot be made of that.");
}
