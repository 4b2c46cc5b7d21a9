#include "mlx_fused/attention.h"

#include <algorithm>
#include <limits>
#include <span>

#include "mlx/fast.h"
#include "mlx/ops.h"
#include "mlx/transforms.h"
#include "mlx_fused/check.h"
#include "mlx_fused/routing.h"

namespace mlx_fused {

namespace {

// Which keys a query sees by its place, [queries, keys].
mx::array seen_by_place(int queries, int keys, int window, mx::Stream s) {
  auto row = mx::expand_dims(mx::arange(keys - queries, keys, s), 1, s);
  auto col = mx::expand_dims(mx::arange(keys, s), 0, s);
  auto seen = mx::greater_equal(row, col, s);
  return window == 0 ? seen : mx::logical_and(seen, mx::less(row, mx::add(col, mx::array(window), s), s), s);
}

// Arrays of four dimensions; the mask may have fewer, or dimensions of 1.
void check_shapes(std::span<const mx::array> inputs, const AttentionKind& kind) {
  static const std::string operation = "fused_attention";
  Check check(operation);
  auto &q = inputs[0], &k = inputs[1], &v = inputs[2];
  int heads = q.shape(1), kv_heads = k.shape(1);
  check.positive({"the number of heads of k"}, kv_heads);
  check.shape({"k"}, k, {q.shape(0), kv_heads, k.shape(2), q.shape(3)});
  check.shape({"v"}, v, {q.shape(0), kv_heads, k.shape(2), v.shape(3)});
  if (heads % kv_heads != 0) {
    check.fail("q must have a multiple of the ", kv_heads, " heads of k but got ", heads, ".");
  }
  if (kind.has_mask) {
    check.broadcasts({"mask"}, inputs[3], {q.shape(0), heads, q.shape(2), k.shape(2)});
  }
  if (kind.has_sinks) {
    check.shape({"sinks"}, inputs.back(), {heads});
  }
}

// Of a primitive, which mx.compile may give other shapes than it was made with.
void check_whole_shapes(std::span<const mx::array> inputs, const AttentionKind& kind) {
  check_shapes(inputs, kind);
  if (kind.has_mask) {
    auto &q = inputs[0], &mask = inputs[3];
    mx::Shape whole = {q.shape(0), q.shape(1), q.shape(2), inputs[1].shape(2)};
    if (mask.shape() != whole) {
      throw std::invalid_argument("[fused_attention] mask has another shape than it was compiled with.");
    }
  }
}

// Attention in MLX's own operations.
mx::array of_mlx(const Arrays& inputs, const AttentionKind& kind, mx::Stream s) {
  auto &q = inputs[0], &k = inputs[1];
  auto mask = kind.has_mask ? std::optional(inputs[3]) : std::nullopt;
  bool has_window = kind.window > 0 && kind.window < k.shape(2);
  if (has_window) {
    mask = seen_by_place(q.shape(2), k.shape(2), kind.window, s);
  }
  auto sinks = kind.has_sinks ? std::optional(inputs[3 + kind.has_mask]) : std::nullopt;
  auto mode = kind.causal && !has_window ? "causal" : mask ? "array" : "";
  return mx::fast::scaled_dot_product_attention(q, k, inputs[2], kind.scale, mode, mask, sinks, false, s);
}

}  // namespace

mx::array attention(const Arrays& inputs, const AttentionKind& kind, mx::Stream s) {
  check_shapes(inputs, kind);
  auto dtype = mx::result_type({inputs[0], inputs[1], inputs[2]});
  auto ours = inputs;
  for (size_t i = 0; i < ours.size(); ++i) {
    bool is_boolean = kind.has_mask && i == 3 && ours[i].dtype() == mx::bool_;
    ours[i] = is_boolean ? ours[i] : mx::astype(ours[i], dtype, s);
  }
  auto &q = ours[0], &k = ours[1];
  if (kind.has_mask) {
    ours[3] = mx::broadcast_to(ours[3], {q.shape(0), q.shape(1), q.shape(2), k.shape(2)}, s);
  }
  if (!is_known(dtype) || describe(s.device).kind != DeviceInfo::cpu) {
    return of_mlx(ours, kind, s);
  }
  check_cpu_settings();
  return Attention::of(ours, kind, s)[0];
}

Arrays Attention::of(const Arrays& inputs, const AttentionKind& kind, mx::Stream s) {
  auto primitive = std::make_shared<Attention>(s, kind);
  return mx::array::make_arrays(
      primitive->output_shapes(inputs), {inputs[0].dtype(), mx::float32}, primitive, inputs);
}

std::vector<mx::Shape> Attention::output_shapes(const Arrays& inputs) {
  check_whole_shapes(inputs, kind_);
  auto shape = inputs[0].shape();
  auto softmaxes = shape;
  shape[3] = inputs[2].shape(3);
  softmaxes[3] = 2;
  return {shape, softmaxes};
}

Function Attention::composed() {
  return [kind = kind_, s = stream()](const Arrays& inputs) {
    // Where this runs, AttentionGrad is composed too, and nothing reads the softmaxes. NaN would show it.
    auto shape = inputs[0].shape();
    shape[3] = 2;
    return Arrays{of_mlx(inputs, kind, s), mx::full(shape, std::numeric_limits<float>::quiet_NaN(), s)};
  };
}

Arrays Attention::vjp(
    const Arrays& primals, const Arrays& cotangents, const std::vector<int>& argnums, const Arrays& outputs) {
  // Nothing but AttentionGrad reads the softmaxes, whose own derivatives do not: their cotangent is always 0.
  // A custom function that consumes this output may return a cotangent of another dtype.
  Arrays inputs = {mx::astype(cotangents[0], outputs[0].dtype(), stream()), outputs[0], outputs[1]};
  inputs.insert(inputs.end(), primals.begin(), primals.end());
  auto grads = AttentionGrad::of(inputs, kind_, stream());
  // What is not wanted in the end is not evaluated: mx.checkpoint asks for the gradient of every argument.
  auto of_mask = [&] {
    bool is_boolean = primals[3].dtype() == mx::bool_;
    return is_boolean ? mx::zeros_like(primals[3], stream())
                      : FusedPrimitive::vjp(primals, cotangents, {3}, outputs)[0];
  };
  Arrays wanted;
  for (int i : argnums) {
    // The sinks' is after that of v.
    wanted.push_back(kind_.has_mask && i == 3 ? of_mask() : grads[std::min(i, 3)]);
  }
  return wanted;
}

Arrays AttentionGrad::of(const Arrays& inputs, const AttentionKind& kind, mx::Stream s) {
  auto primitive = std::make_shared<AttentionGrad>(s, kind);
  auto shapes = primitive->output_shapes(inputs);
  std::vector dtypes(shapes.size(), inputs[0].dtype());
  return mx::array::make_arrays(shapes, dtypes, primitive, inputs);
}

std::vector<mx::Shape> AttentionGrad::output_shapes(const Arrays& inputs) {
  check_whole_shapes(std::span(inputs).subspan(3), kind_);
  std::vector shapes = {inputs[3].shape(), inputs[4].shape(), inputs[5].shape()};
  if (kind_.has_sinks) {
    shapes.push_back(inputs.back().shape());
  }
  return shapes;
}

Function AttentionGrad::composed() {
  return [kind = kind_, s = stream()](const Arrays& inputs) {
    Arrays of(inputs.begin() + 3, inputs.end()), wanted(of.begin(), of.begin() + 3);
    if (kind.has_sinks) {
      wanted.push_back(of.back());
    }
    auto attention = [&](const Arrays& args) {
      auto all = of;
      std::copy_n(args.begin(), 3, all.begin());
      if (kind.has_sinks) {
        all.back() = args[3];
      }
      return Arrays{of_mlx(all, kind, s)};
    };
    return mx::vjp(attention, wanted, {inputs[0]}).second;
  };
}

}  // namespace mlx_fused
