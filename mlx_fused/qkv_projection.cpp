#include "mlx_fused/qkv_projection.h"

#include <limits>

#include "mlx_fused/projection.h"

namespace mlx_fused {

namespace {

// The segments of q, k and v: their features and heads.
std::vector<Segment> make_segments(const Check& check, const Linears& layers, const Heads& heads) {
  if (layers.size() != 1 && layers.size() != 3) {
    auto must = "weight must be one array or a tuple of three (q, k, v) but got a tuple of ";
    check.fail(must, layers.size(), ".");
  }
  if (!heads.num_heads && !heads.num_kv_heads && !heads.head_dim && !heads.v_head_dim && !heads.split &&
      layers.size() == 3) {
    std::vector<Segment> segments;
    for (size_t i = 0; i < 3; ++i) {
      auto name = "weight[" + std::to_string(i) + "]";
      check.ndim(name, layers[i].weight, 2);
      check.positive("the rows of " + name, layers[i].weight.shape(0));
      segments.push_back({layers[i].weight.shape(0)});
    }
    return segments;
  }
  auto positive = [&](const char* name, const std::optional<int>& value) {
    if (!value) {
      check.fail(
          name,
          " must be given but got None; heads may be left out, all of them, with split_heads=False and a "
          "tuple of three weights.");
    }
    check.positive(name, *value);
    return *value;
  };
  int num_heads = positive("num_heads", heads.num_heads);
  int num_kv_heads = positive("num_kv_heads", heads.num_kv_heads);
  int head_dim = positive("head_dim", heads.head_dim);
  int v_head_dim = positive("v_head_dim", heads.v_head_dim ? heads.v_head_dim : heads.head_dim);
  if (num_heads % num_kv_heads != 0) {
    auto must = "num_heads must be a multiple of num_kv_heads but got ";
    check.fail(must, num_heads, " and ", num_kv_heads, ".");
  }
  constexpr int64_t max_features = std::numeric_limits<int>::max();
  if ((int64_t{num_heads} + num_kv_heads) * head_dim > max_features - int64_t{num_kv_heads} * v_head_dim) {
    auto must = "the features of all heads must be below 2^31 but got num_heads ";
    auto kv = ", num_kv_heads ", dim = ", head_dim ", v_dim = " and v_head_dim ";
    check.fail(must, num_heads, kv, num_kv_heads, dim, head_dim, v_dim, v_head_dim, ".");
  }
  auto segment = [&](int count, int dim) {
    return Segment{.features = count * dim, .heads = heads.split ? count : 0};
  };
  return {segment(num_heads, head_dim), segment(num_kv_heads, head_dim), segment(num_kv_heads, v_head_dim)};
}

// Checks everything except the layers' arrays, which check_arguments does.
Call make_call(const Check& check, const mx::array& input, const Linears& layers, const Heads& heads) {
  auto segments = make_segments(check, layers, heads);
  check.ndim("input", input, 3);
  check.floating("input", input);
  return {.operation = check.operation(), .node = "FusedQKVProjection", .segments = segments};
}

}  // namespace

Arrays qkv_projection(
    const mx::array& input,
    const Linears& layers,
    const Heads& heads,
    bool exact,
    const std::optional<std::string>& route,
    mx::StreamOrDevice s) {
  Check check("fused_qkv_projection");
  auto call = make_call(check, input, layers, heads);
  call.epilogue.exact = exact;
  auto stream = mx::to_stream(s);
  auto inputs = check_arguments(check, input, layers, std::nullopt, call, Products(stream, route));
  return project(std::move(inputs), std::move(call), route, stream);
}

Arrays qkv_projection_bwd(
    const mx::array& dq,
    const mx::array& dk,
    const mx::array& dv,
    const mx::array& input,
    const Arrays& weights,
    bool has_bias,
    const Heads& heads,
    const std::optional<std::string>& route,
    mx::StreamOrDevice s) {
  Check check("fused_qkv_projection_bwd");
  Linears layers;
  for (auto& weight : weights) {
    layers.push_back({.weight = weight});
  }
  auto stream = mx::to_stream(s);
  auto call = make_call(check, input, layers, heads);
  auto primals = check_arguments(check, input, layers, std::nullopt, call, Products(stream, route));
  return all_gradients(check, {"dq", "dk", "dv"}, {dq, dk, dv}, primals, call, has_bias, route, stream);
}

}  // namespace mlx_fused
