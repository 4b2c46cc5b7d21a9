#include "mlx_fused/rope.h"

#include "mlx/fast.h"
#include "mlx/ops.h"
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

mx::array rope(Arrays inputs, const RopeKind& kind, mx::Stream s) {
  auto& x = inputs[0];
  if (!is_known(x.dtype()) || x.ndim() > 4 || describe(s.device).kind != DeviceInfo::cpu) {
    return of_mlx(inputs, kind, s);
  }
  check_cpu_settings();
  if (kind.has_offsets) {
    inputs[1] = mx::astype(inputs[1], mx::int32, s);
  }
  if (kind.has_freqs) {
    inputs.back() = mx::astype(inputs.back(), mx::float32, s);
  }
  return make(inputs, kind, s);
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
