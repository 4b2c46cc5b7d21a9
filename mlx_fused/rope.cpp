#include "mlx_fused/rope.h"

#include <cmath>

#include "mlx/fast.h"
#include "mlx/ops.h"
#include "mlx_fused/check.h"
#include "mlx_fused/routing.h"

namespace mlx_fused {

namespace {

mx::array of_mlx(const Arrays& inputs, const RopeKind& kind, mx::Stream s) {
  auto freqs = kind.has_freqs ? std::optional(inputs.back()) : std::nullopt;
  auto base = kind.has_freqs ? std::nullopt : std::optional(kind.base);
  auto offset = kind.has_offsets ? inputs[1] : mx::array(kind.offset, mx::int32);
  return mx::fast::rope(inputs[0], kind.dims, kind.traditional, base, kind.scale, offset, freqs, s);
}

mx::array make(const Arrays& inputs, const RopeKind& kind, mx::Stream s) {
  return {inputs[0].shape(), inputs[0].dtype(), std::make_shared<Rope>(s, kind), inputs};
}

}  // namespace

void check_rope(const Arrays& inputs, const RopeKind& kind) {
  static const std::string operation = "fused_rope";
  Check check(operation);
  auto& x = inputs[0];
  if (x.ndim() < 3) {
    check.fail("x must have at least 3 dimensions but got ", x.ndim(), ".");
  }
  if (kind.dims <= 0 || kind.dims % 2 != 0 || kind.dims > x.shape(-1)) {
    check.fail("dims must be even, greater than 0 and at most ", x.shape(-1), " but got ", kind.dims, ".");
  }
  if (!kind.has_freqs && !(kind.base > 0 && std::isfinite(kind.base))) {
    check.fail("base must be greater than 0 and finite but got ", kind.base, ".");
  }
  if (kind.has_offsets) {
    auto& offset = inputs[1];
    if (offset.ndim() > 1 || (offset.size() != 1 && offset.size() != size_t(x.shape(0)))) {
      check.fail("offset must have shape () or (", x.shape(0), ",) but got ", offset.shape(), ".");
    }
  }
  if (kind.has_freqs) {
    check.shape({"freqs"}, inputs.back(), {kind.dims / 2});
  }
}

mx::array rope(Arrays inputs, const RopeKind& kind, mx::Stream s) {
  check_rope(inputs, kind);
  auto& x = inputs[0];
  if (!is_known(x.dtype()) || x.ndim() > 4 || describe(s.device).kind != DeviceInfo::cpu) {
    return of_mlx(inputs, kind, s);
  }
  check_cpu_settings();
  if (kind.has_offsets) {
    inputs[1] = mx::astype(inputs[1], mx::int64, s);
  }
  if (kind.has_freqs) {
    inputs.back() = mx::astype(inputs.back(), mx::float32, s);
  }
  return make(inputs, kind, s);
}

// mx.compile may give it other shapes than it was made with.
std::vector<mx::Shape> Rope::output_shapes(const Arrays& inputs) {
  check_rope(inputs, kind_);
  return {inputs[0].shape()};
}

Function Rope::composed() {
  return [kind = kind_, s = stream()](const Arrays& inputs) { return Arrays{of_mlx(inputs, kind, s)}; };
}

Arrays Rope::apply(const Arrays& inputs) {
  return {make(inputs, kind_, stream())};
}

Arrays Rope::vjp(
    const Arrays& primals, const Arrays& cotangents, const std::vector<int>& argnums, const Arrays& outputs) {
  if (argnums != std::vector{0}) {
    return FusedPrimitive::vjp(primals, cotangents, argnums, outputs);
  }
  // The cotangent is rotated back. A custom function that consumes the output may return one of another
  // dtype.
  auto inputs = primals;
  inputs[0] = mx::astype(cotangents[0], primals[0].dtype(), stream());
  auto back = kind_;
  back.scale = -back.scale;
  return {make(inputs, back, stream())};
}

}  // namespace mlx_fused
