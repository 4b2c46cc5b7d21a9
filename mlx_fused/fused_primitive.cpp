#include "mlx_fused/fused_primitive.h"

#include <algorithm>
#include <stdexcept>
#include <string>
#include <string_view>

#include "mlx/allocator.h"
#include "mlx/ops.h"
#include "mlx/transforms.h"

namespace mlx_fused {

namespace {

// fun as a function of the arguments in argnums only; the others stay at their primals.
Function restrict_to(const Function& fun, const Arrays& primals, const std::vector<int>& argnums) {
  return [fun, primals, argnums](const Arrays& args) {
    auto all = primals;
    for (size_t i = 0; i < argnums.size(); ++i) {
      all[argnums[i]] = args[i];
    }
    return fun(all);
  };
}

}  // namespace

Arrays select(const Arrays& arrays, const std::vector<int>& indices) {
  Arrays selected;
  for (int i : indices) {
    selected.push_back(arrays[i]);
  }
  return selected;
}

void allocate(Arrays& outputs) {
  for (auto& out : outputs) {
    out.set_data(mx::allocator::malloc(out.nbytes()));
  }
}

Arrays map_one_by_one(const Function& fun, const Arrays& inputs, const std::vector<int>& axes, mx::Stream s) {
  auto mapped = std::find_if(axes.begin(), axes.end(), [](int axis) { return axis != -1; }) - axes.begin();
  std::vector<Arrays> results;
  for (int i = 0; i < inputs[mapped].shape(axes[mapped]); ++i) {
    auto one = inputs;
    for (size_t j = 0; j < inputs.size(); ++j) {
      if (axes[j] != -1) {
        one[j] = mx::take(inputs[j], i, axes[j], s);
      }
    }
    results.push_back(fun(one));
  }
  if (results.empty()) {
    throw std::invalid_argument(
        "[vmap] the mapped axis of a quantized projection must be at least 1 long but got 0.");
  }
  Arrays stacked;
  for (size_t k = 0; k < results[0].size(); ++k) {
    Arrays parts;
    for (auto& result : results) {
      parts.push_back(result[k]);
    }
    stacked.push_back(mx::stack(parts, 0, s));
  }
  return stacked;
}

void FusedPrimitive::eval_gpu(const Arrays&, Arrays&) {
  throw std::runtime_error("[" + std::string(name()) + "] There are no kernels for this GPU.");
}

Arrays FusedPrimitive::vjp(
    const Arrays& primals, const Arrays& cotangents, const std::vector<int>& argnums, const Arrays&) {
  auto fun = restrict_to(composed(), primals, argnums);
  return mx::vjp(fun, select(primals, argnums), cotangents).second;
}

Arrays FusedPrimitive::jvp(const Arrays& primals, const Arrays& tangents, const std::vector<int>& argnums) {
  auto fun = restrict_to(composed(), primals, argnums);
  return mx::jvp(fun, select(primals, argnums), tangents).second;
}

std::pair<Arrays, std::vector<int>> FusedPrimitive::vmap(const Arrays& inputs, const std::vector<int>& axes) {
  if (is_quantized()) {
    auto outputs = map_one_by_one([this](const auto& one) { return apply(one); }, inputs, axes, stream());
    return {outputs, std::vector<int>(outputs.size(), 0)};
  }
  auto outputs = mx::vmap(composed(), axes)(inputs);
  return {outputs, std::vector<int>(outputs.size(), 0)};
}

mx::array made_again(const mx::array& x) {
  auto* primitive =
      x.has_primitive() && !x.is_available() ? dynamic_cast<FusedPrimitive*>(&x.primitive()) : nullptr;
  return primitive ? primitive->made_again(x).value_or(x) : x;
}

bool is_to_be_made_by(const char* name, const mx::array& x, mx::Stream s) {
  return x.status() == mx::array::Status::unscheduled && x.has_primitive() && x.primitive().stream() == s &&
         std::string_view(x.primitive().name()) == name;
}

bool is_zero(const mx::array& cotangent) {
  auto* a = &cotangent;
  auto spreads = [](const mx::Primitive& p) {
    std::string_view name = p.name();
    return name == "Full" || name == "Broadcast" || name == "AsType";
  };
  while (a->has_primitive() && spreads(a->primitive())) {
    a = &a->inputs()[0];
  }
  auto is_null = [](char byte) { return byte == 0; };
  // A constant is held by nobody else. is_tracer() would not tell: during a vjp every array counts as traced.
  return a->size() == 1 && !a->has_primitive() && a->is_available() && a->is_donatable() &&
         std::all_of(a->data<char>(), a->data<char>() + a->itemsize(), is_null);
}

}  // namespace mlx_fused
