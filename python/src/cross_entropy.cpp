#include <nanobind/nanobind.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/variant.h>
#include <nanobind/stl/vector.h>

#include <cmath>

#include "mlx_fused/arguments.h"
#include "mlx_fused/cross_entropy.h"
#include "python/src/bindings.h"

namespace mx = mlx::core;
namespace nb = nanobind;
using namespace nb::literals;

namespace {

mx::array cross_entropy(
    const mx::array& x,
    const nb::sequence& layer,
    const mx::array& targets,
    const OptionalArray& mask,
    const std::optional<int64_t>& ignore_index,
    float scale,
    const std::optional<float>& softcap,
    float label_smoothing,
    const std::optional<std::string>& route,
    mx::StreamOrDevice s,
    const std::optional<std::pair<int, int>>& blocks) {
  static const std::string operation = "fused_linear_cross_entropy";
  auto stream = mx::to_stream(s);
  mlx_fused::Check check(operation);
  mlx_fused::LossCall call{
      .head = {.operation = operation, .node = operation, .segments = {{.features = 0}}},
      .softcap = softcap.value_or(0),
      .smoothing = label_smoothing};
  call.head.epilogue.alpha = scale;
  mlx_fused::Products products(stream, route);
  auto inputs = mlx_fused::check_arguments(
      check, "x", x, std::nullopt, linears(layer), std::nullopt, call.head, products);
  check.positive({"the rows of weight"}, call.head.segments[0].features);
  if (!mx::issubdtype(targets.dtype(), mx::integer)) {
    check.fail("targets must be integers but got ", targets.dtype(), ".");
  }
  if (mask) {
    check.dtype({"mask"}, *mask, mx::bool_);
  }
  if (softcap && !(*softcap > 0 && std::isfinite(*softcap))) {
    check.fail("softcap must be greater than 0 and finite but got ", *softcap, ".");
  }
  if (!(label_smoothing >= 0 && label_smoothing < 1)) {
    check.fail("label_smoothing must be at least 0 and less than 1 but got ", label_smoothing, ".");
  }
  inputs.push_back(targets);
  std::optional<mlx_fused::BlockSize> size;
  if (blocks) {
    size = {blocks->first, blocks->second};
  }
  return mlx_fused::cross_entropy(
      std::move(inputs), std::move(call), mask, ignore_index, route, size, stream);
}

}  // namespace

void bind_cross_entropy(nb::module_& m) {
  m.def(
      "cross_entropy",
      &cross_entropy,
      "x"_a,
      "layer"_a,
      "targets"_a,
      "mask"_a.none(),
      "ignore_index"_a.none(),
      "scale"_a,
      "softcap"_a.none(),
      "label_smoothing"_a,
      "route"_a,
      "stream"_a.none(),
      "blocks"_a = nb::none());  // of so many rows and logits, for tests
}
