#include "mlx_fused/qkv_projection.h"

#include <limits>

#include "mlx/ops.h"
#include "mlx_fused/projection.h"

namespace mlx_fused {

namespace {

constexpr int64_t max_features = std::numeric_limits<int>::max();

// Checks everything but the weights.
Call make_call(const Check& check, const std::string& operation, const mx::array& input, const Heads& heads) {
  check.positive("num_heads", heads.num_heads);
  check.positive("num_kv_heads", heads.num_kv_heads);
  check.positive("head_dim", heads.head_dim);
  int v_head_dim = heads.v_head_dim.value_or(heads.head_dim);
  check.positive("v_head_dim", v_head_dim);
  if (heads.num_heads % heads.num_kv_heads != 0) {
    check.fail(
        "num_heads must be a multiple of num_kv_heads but got " + std::to_string(heads.num_heads) + " and " +
        std::to_string(heads.num_kv_heads) + ".");
  }
  int64_t qk_heads = int64_t(heads.num_heads) + heads.num_kv_heads;
  if (qk_heads * heads.head_dim > max_features - int64_t(heads.num_kv_heads) * v_head_dim) {
    check.fail(
        "the features of all heads must be below 2^31 but got num_heads " + std::to_string(heads.num_heads) +
        ", num_kv_heads " + std::to_string(heads.num_kv_heads) + ", head_dim " +
        std::to_string(heads.head_dim) + " and v_head_dim " + std::to_string(v_head_dim) + ".");
  }
  check.ndim("input", input, 3);
  check.floating("input", input);
  auto segment = [&](int num_heads, int dim) {
    return Segment{num_heads * dim, heads.split ? num_heads : 0};
  };
  return {
      .operation = operation,
      .node = "FusedQKVProjection",
      .segments = {
          segment(heads.num_heads, heads.head_dim),
          segment(heads.num_kv_heads, heads.head_dim),
          segment(heads.num_kv_heads, v_head_dim)}};
}

}  // namespace

Arrays qkv_projection(
    const std::string& operation,
    const mx::array& input,
    const Weights& weights,
    const Heads& heads,
    bool exact,
    const std::optional<std::string>& wish,
    mx::StreamOrDevice s) {
  Check check(operation);
  auto call = make_call(check, operation, input, heads);
  call.epilogue.exact = exact;
  auto stream = mx::to_stream(s);
  auto inputs = check_arguments(check, input, weights, nullptr, call, Products(stream, wish));
  return project(std::move(inputs), std::move(call), wish, stream);
}

Arrays qkv_projection_bwd(
    const mx::array& dq,
    const mx::array& dk,
    const mx::array& dv,
    const mx::array& input,
    const Parts& weight,
    bool has_bias,
    const Heads& heads,
    const std::optional<std::string>& wish,
    mx::StreamOrDevice s) {
  std::string operation = "fused_qkv_projection_bwd";
  Check check(operation);
  auto stream = mx::to_stream(s);
  auto call = make_call(check, operation, input, heads);
  auto primals = check_arguments(check, input, {weight, {}, {}, {}}, nullptr, call, Products(stream, wish));
  const char* names[] = {"dq", "dk", "dv"};
  Arrays cotangents = {dq, dk, dv};
  for (int i = 0; i < 3; ++i) {
    auto& [features, num_heads, adapter_scale] = call.segments[i];
    check.shape(names[i], cotangents[i], {input.shape(0), num_heads, input.shape(1), features / num_heads});
    check.floating(names[i], cotangents[i]);
  }
  auto grads = all_gradients(cotangents, primals, call, has_bias, wish, stream);
  if (std::holds_alternative<Arrays>(weight)) {
    return grads;
  }
  Arrays packed = {grads[0]};
  for (size_t first = 1; first < grads.size(); first += 3) {
    packed.push_back(mx::concatenate({grads.begin() + first, grads.begin() + first + 3}, 0, stream));
  }
  return packed;
}

}  // namespace mlx_fused
