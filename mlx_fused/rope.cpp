#include "mlx_fused/rope.h"

#include <algorithm>
#include <cmath>

#include "mlx/fast.h"
#include "mlx/ops.h"
#include "mlx_fused/check.h"
#include "mlx_fused/norm.h"
#include "mlx_fused/routing.h"

namespace mlx_fused {

namespace {

template <typename T>
std::optional<T> copied(const T* value) {
  return value ? std::optional(*value) : std::nullopt;
}

mx::array of_mlx(const Arrays& inputs, const RopeKind& kind, mx::Stream s) {
  RopeInputs given(inputs, kind);
  auto x = given.x;
  if (kind.heads) {
    x = mx::unflatten(x, -1, {kind.heads, x.shape(-1) / kind.heads}, s);
    x = kind.norm ? rms_norm(x, copied(given.norm_weight), kind.norm->eps, false, s) : x;
    x = mx::transpose(x, {0, 2, 1, 3}, s);
  }
  auto base = kind.has_freqs ? std::nullopt : std::optional(kind.base);
  auto offset = kind.has_offsets ? *given.offsets : mx::array(kind.offset, mx::int32);
  return mx::fast::rope(x, kind.dims, kind.traditional, base, kind.scale, offset, copied(given.freqs), s);
}

mx::Shape output_shape(const mx::array& x, const RopeKind& kind) {
  return kind.heads ? mx::Shape{x.shape(0), kind.heads, x.shape(1), x.shape(2) / kind.heads} : x.shape();
}

mx::array make(const Arrays& inputs, const RopeKind& kind, mx::Stream s) {
  return {output_shape(inputs[0], kind), inputs[0].dtype(), std::make_shared<Rope>(s, kind), inputs};
}

// Takes over the norm, the split into heads and the transposition that x is to be made by.
void take_over(Arrays& inputs, RopeKind& kind, mx::Stream s) {
  auto x = inputs[0];
  if (x.ndim() != 4 || x.is_tracer()) {
    return;
  }
  std::optional<Unnormed> norm;
  for (bool transposed = false;;) {
    if (auto before = norm ? std::nullopt : unnormed(x, s)) {
      norm = before;
      x = before->x;
    } else if (!transposed && is_to_be_made_by("Transpose", x, s)) {
      transposed = static_cast<mx::Transpose&>(x.primitive()).state() == std::vector{0, 2, 1, 3};
      if (!transposed) {
        return;
      }
      x = mx::array(x.inputs()[0]);
    } else if (transposed && is_to_be_made_by("Reshape", x, s)) {
      auto& from = x.inputs()[0];
      if (from.shape() == mx::Shape{x.shape(0), x.shape(1), x.shape(2) * x.shape(3)}) {
        kind.heads = x.shape(2);
        inputs[0] = from;
        if (norm) {
          kind.norm = norm->norm;
        }
        if (norm && norm->weight) {
          inputs.insert(inputs.begin() + 1, *norm->weight);
        }
      }
      return;
    } else {
      return;
    }
  }
}

}  // namespace

void check_rope(const Arrays& inputs, const RopeKind& kind) {
  static const std::string operation = "fused_rope";
  Check check(operation);
  RopeInputs given(inputs, kind);
  auto& x = given.x;
  int size = x.shape(-1) / std::max(1, kind.heads);
  if (x.ndim() < 3) {
    check.fail("x must have at least 3 dimensions but got ", x.ndim(), ".");
  }
  if (kind.dims <= 0 || kind.dims % 2 != 0 || kind.dims > size) {
    check.fail("dims must be even, greater than 0 and at most ", size, " but got ", kind.dims, ".");
  }
  if (!kind.has_freqs && !(kind.base > 0 && std::isfinite(kind.base))) {
    check.fail("base must be greater than 0 and finite but got ", kind.base, ".");
  }
  if (kind.has_offsets) {
    auto& offset = *given.offsets;
    if (offset.ndim() > 1 || (offset.size() != 1 && offset.size() != size_t(x.shape(0)))) {
      check.fail("offset must have shape () or (", x.shape(0), ",) but got ", offset.shape(), ".");
    }
  }
  if (kind.has_freqs) {
    check.shape({"freqs"}, *given.freqs, {kind.dims / 2});
  }
}

mx::array rope(Arrays inputs, RopeKind kind, mx::Stream s) {
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
  take_over(inputs, kind, s);
  return make(inputs, kind, s);
}

// mx.compile may give it other shapes than it was made with.
std::vector<mx::Shape> Rope::output_shapes(const Arrays& inputs) {
  check_rope(inputs, kind_);
  return {output_shape(inputs[0], kind_)};
}

Function Rope::composed() {
  return [kind = kind_, s = stream()](const Arrays& inputs) { return Arrays{of_mlx(inputs, kind, s)}; };
}

Arrays Rope::apply(const Arrays& inputs) {
  return {make(inputs, kind_, stream())};
}

Arrays Rope::vjp(
    const Arrays& primals, const Arrays& cotangents, const std::vector<int>& argnums, const Arrays& outputs) {
  if (argnums != std::vector{0} || kind_.heads) {
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
