#include "mlx_fused/operands.h"

#include <algorithm>
#include <numeric>

#include "mlx/ops.h"

namespace mlx_fused {

namespace {

Arrays flat(const Parts& parts) {
  if (auto* packed = std::get_if<mx::array>(&parts)) {
    return {*packed};
  }
  return std::get<Arrays>(parts);
}

std::string part_name(const char* name, const Operands& operands, int part) {
  return operands.parts == 1 ? name : name + ("[" + std::to_string(part) + "]");
}

// The parts as a list, once they are as many as the weight's.
Arrays check_parts(const Check& check, const char* name, const Parts& parts, const Operands& operands) {
  auto arrays = flat(parts);
  bool packed = std::holds_alternative<mx::array>(parts);
  if (packed != (operands.parts == 1) || int(arrays.size()) != operands.parts) {
    check.fail(
        std::string(name) +
        (operands.parts == 1 ? " must be one packed array as weight is"
                             : " must be a tuple of three arrays (q, k, v)") +
        " but got " + (packed ? "one array." : "a tuple of " + std::to_string(arrays.size()) + "."));
  }
  return arrays;
}

bool contains(const std::vector<int>& values, int value) {
  return std::find(values.begin(), values.end(), value) != values.end();
}

Quantization check_quantization(const Check& check, const QuantizedParts& parts) {
  Quantization q{parts.mode, 0, 0};
  std::vector<int> group_sizes, bits;
  if (q.mode == "affine") {
    group_sizes = {64, 32, 128};
    bits = {4, 2, 3, 5, 6, 8};
  } else if (q.mode == "mxfp4") {
    group_sizes = {32};
    bits = {4};
  } else if (q.mode == "mxfp8") {
    group_sizes = {32};
    bits = {8};
  } else if (q.mode == "nvfp4") {
    group_sizes = {16};
    bits = {4};
  } else {
    check.fail("mode must be 'affine', 'mxfp4', 'mxfp8' or 'nvfp4' but got '" + q.mode + "'.");
  }
  q.group_size = parts.group_size.value_or(group_sizes[0]);
  q.bits = parts.bits.value_or(bits[0]);
  if (!contains(group_sizes, q.group_size)) {
    check.fail(
        "group_size must be " +
        std::string(group_sizes.size() > 1 ? "32, 64 or 128" : std::to_string(group_sizes[0])) +
        " for mode '" + q.mode + "' but got " + std::to_string(q.group_size) + ".");
  }
  if (!contains(bits, q.bits)) {
    check.fail(
        "bits must be " + std::string(bits.size() > 1 ? "2, 3, 4, 5, 6 or 8" : std::to_string(bits[0])) +
        " for mode '" + q.mode + "' but got " + std::to_string(q.bits) + ".");
  }
  return q;
}

// The weight's parts, then scales' and groups' biases'.
Arrays check_quantized(
    const Check& check,
    const Parts& weight,
    const QuantizedParts& quantized,
    const std::vector<int>& features,
    int in_features,
    const Operands& operands) {
  auto& q = *operands.quantization;
  if (in_features % q.group_size != 0) {
    check.fail(
        "the input's features must be a multiple of group_size but got " + std::to_string(in_features) +
        " and " + std::to_string(q.group_size) + ".");
  }
  if (quantized.biases.has_value() != q.is_affine()) {
    check.fail(
        q.is_affine() ? "biases must be given for mode 'affine' but got None."
                      : "biases must be None for mode '" + q.mode + "'.");
  }
  auto all = check_parts(check, "weight", weight, operands);
  for (int part = 0; part < operands.parts; ++part) {
    auto name = part_name("weight", operands, part);
    check.dtype(name, all[part], mx::uint32);
    check.shape(name, all[part], {features[part], int(int64_t(in_features) * q.bits / 32)});
  }
  auto add = [&](const char* name, const Parts& parts) {
    auto arrays = check_parts(check, name, parts, operands);
    for (int part = 0; part < operands.parts; ++part) {
      auto full_name = part_name(name, operands, part);
      check.shape(full_name, arrays[part], {features[part], in_features / q.group_size});
      if (q.is_affine()) {
        check.floating(full_name, arrays[part]);
      } else {
        check.dtype(full_name, arrays[part], mx::uint8);
      }
    }
    all.insert(all.end(), arrays.begin(), arrays.end());
  };
  add("scales", quantized.scales);
  if (quantized.biases) {
    add("biases", *quantized.biases);
  }
  return all;
}

Arrays check_dense(
    const Check& check,
    const char* name,
    const Parts& parts,
    const std::vector<int>& features,
    std::optional<int> in_features,
    const Operands& operands) {
  auto arrays = check_parts(check, name, parts, operands);
  for (int part = 0; part < operands.parts; ++part) {
    mx::Shape shape = {features[part]};
    if (in_features) {
      shape.push_back(*in_features);
    }
    auto full_name = part_name(name, operands, part);
    check.floating(full_name, arrays[part]);
    check.shape(full_name, arrays[part], shape);
  }
  return arrays;
}

Arrays check_adapters(
    const Check& check,
    const Adapters& adapters,
    const std::vector<int>& features,
    int in_features,
    Operands& operands) {
  size_t segments = features.size();
  for (auto [name, count] :
       {std::pair("lora_a", adapters.a.size()), std::pair("lora_b", adapters.b.size())}) {
    if (count != segments) {
      check.fail(
          std::string(name) +
          " must be a tuple of three, an array or None for each of q, k and v, but got a tuple of " +
          std::to_string(count) + ".");
    }
  }
  if (adapters.scale.size() != 1 && adapters.scale.size() != segments) {
    check.fail(
        "scale must be a number or a tuple of three but got a tuple of " +
        std::to_string(adapters.scale.size()) + ".");
  }
  Arrays arrays;
  for (size_t i = 0; i < segments; ++i) {
    auto suffix = segments == 1 ? "" : "[" + std::to_string(i) + "]";
    auto &a = adapters.a[i], &b = adapters.b[i];
    if (a.has_value() != b.has_value()) {
      check.fail(
          "lora_a" + suffix + " and lora_b" + suffix + " must both be arrays or both None but only lora_" +
          (a ? "a" : "b") + suffix + " is an array.");
    }
    if (a) {
      check.ndim("lora_a" + suffix, *a, 2);
      check.shape("lora_a" + suffix, *a, {in_features, a->shape(1)});
      check.floating("lora_a" + suffix, *a);
      check.shape("lora_b" + suffix, *b, {a->shape(1), features[i]});
      check.floating("lora_b" + suffix, *b);
      operands.adapters[i] = adapters.scale[adapters.scale.size() == 1 ? 0 : i];
      arrays.push_back(*a);
      arrays.push_back(*b);
    }
  }
  if (arrays.empty()) {
    check.fail("lora_a must hold at least one array but got None for every segment.");
  }
  return arrays;
}

}  // namespace

Arrays check_operands(
    const Check& check,
    const mx::array& input,
    const Weights& weights,
    const std::vector<int>& segment_features,
    Operands& operands) {
  bool packed = std::holds_alternative<mx::array>(weights.weight);
  auto features = segment_features;
  if (packed) {
    features = {std::accumulate(features.begin(), features.end(), 0)};
  }
  operands.parts = int(features.size());
  operands.has_bias = weights.bias.has_value();
  int in_features = input.shape(-1);

  Arrays inputs = {input};
  auto append = [&](const Arrays& arrays) { inputs.insert(inputs.end(), arrays.begin(), arrays.end()); };
  if (weights.quantized) {
    operands.quantization = check_quantization(check, *weights.quantized);
    append(check_quantized(check, weights.weight, *weights.quantized, features, in_features, operands));
  } else {
    append(check_dense(check, "weight", weights.weight, features, in_features, operands));
  }
  if (weights.bias) {
    append(check_dense(check, "bias", *weights.bias, features, std::nullopt, operands));
  }
  if (weights.adapters) {
    append(check_adapters(check, *weights.adapters, segment_features, in_features, operands));
  }
  return inputs;
}

std::vector<mx::Dtype> promoted_types(const Arrays& inputs, const Operands& operands) {
  std::vector<mx::Dtype> types;
  for (int part = 0; part < operands.parts; ++part) {
    auto dtype = inputs[Operands::input].dtype();
    auto promote = [&](int i) { dtype = mx::promote_types(dtype, inputs[i].dtype()); };
    if (!operands.quantization) {
      promote(operands.weight(part));
    } else if (operands.quantization->is_affine()) {
      promote(operands.scales(part));
      promote(operands.group_biases(part));
    }
    if (operands.has_bias) {
      promote(operands.bias(part));
    }
    types.push_back(dtype);
  }
  return types;
}

Arrays cast_operands(Arrays inputs, const Operands& operands, mx::Dtype dtype, mx::Stream stream) {
  for (int i = 0; i < int(inputs.size()); ++i) {
    bool adapter = operands.is_adapter(i);
    if (adapter || mx::issubdtype(inputs[i].dtype(), mx::floating)) {
      inputs[i] = mx::astype(inputs[i], adapter ? mx::float32 : dtype, stream);
    }
  }
  return inputs;
}

bool wants_quantization_grad(const Check& check, const Operands& operands, const std::vector<int>& argnums) {
  bool wanted = false;
  for (int argnum : argnums) {
    if (operands.quantization && operands.is_weight(argnum)) {
      check.fail(
          "quantized weights have no gradient; freeze them, and train adapters, biases, or scales of mode "
          "'affine'.");
    }
    wanted |= operands.is_quantization(argnum);
  }
  if (wanted && !operands.quantization->is_affine()) {
    check.fail("scales of mode '" + operands.quantization->mode + "' have no gradient.");
  }
  return wanted;
}

}  // namespace mlx_fused
