#include "mlx_fused/fused_primitive.h"

#include <stdexcept>
#include <string>

#include "mlx/transforms.h"

namespace mlx_fused {

namespace {

Arrays select(const Arrays& arrays, const std::vector<int>& indices) {
  Arrays selected;
  for (int i : indices) {
    selected.push_back(arrays[i]);
  }
  return selected;
}

// The function of the arguments in argnums alone, the others held at their primals.
Function restrict_to(
    const Function& fun,
    const Arrays& primals,
    const std::vector<int>& argnums) {
  return [fun, primals, argnums](const Arrays& args) {
    auto all = primals;
    for (size_t i = 0; i < argnums.size(); ++i) {
      all[argnums[i]] = args[i];
    }
    return fun(all);
  };
}

} // namespace

void FusedPrimitive::eval_gpu(const Arrays&, Arrays&) {
  throw std::runtime_error(
      "[" + std::string(name()) + "] There is no GPU kernel.");
}

Arrays FusedPrimitive::vjp(
    const Arrays& primals,
    const Arrays& cotangents,
    const std::vector<int>& argnums,
    const Arrays&) {
  auto fun = restrict_to(composed(), primals, argnums);
  return mx::vjp(fun, select(primals, argnums), cotangents).second;
}

Arrays FusedPrimitive::jvp(
    const Arrays& primals,
    const Arrays& tangents,
    const std::vector<int>& argnums) {
  auto fun = restrict_to(composed(), primals, argnums);
  return mx::jvp(fun, select(primals, argnums), tangents).second;
}

std::pair<Arrays, std::vector<int>> FusedPrimitive::vmap(
    const Arrays& inputs,
    const std::vector<int>& axes) {
  auto outputs = mx::vmap(composed(), axes)(inputs);
  return {outputs, std::vector<int>(outputs.size(), 0)};
}

} // namespace mlx_fused
