#include "mlx_fused/operands.h"

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

// A format is known, or else MLX's to judge; but what MLX makes of another under a format's name is none.
Quantization check_quantization(const Check& check, const QuantizedParts& parts) {
  Quantization q{parts.mode, 0, 0, parts.biases.has_value()};
  auto set =
      [&](const char* name, int& value, std::optional<int> given, int affine, int Quantization::* only) {
        auto* format = only_format(q.mode);
        value = given.value_or(q.is_affine() ? affine : format ? format->*only : 0);
        if (given) {
          check.positive(name, value);
        }
        if (format && value != format->*only) {
          check.fail(
              std::string(name) + " must be " + std::to_string(format->*only) + " for mode '" + q.mode +
              "' but got " + std::to_string(value) + ".");
        }
      };
  set("group_size", q.group_size, parts.group_size, 64, &Quantization::group_size);
  set("bits", q.bits, parts.bits, 4, &Quantization::bits);
  if (is_known(q) && q.has_biases != q.is_affine()) {
    check.fail(
        q.is_affine() ? "biases must be given for mode 'affine' but got None."
                      : "biases must be None for mode '" + q.mode + "' but got an array.");
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
  bool known = is_known(q);
  if (known && in_features % q.group_size != 0) {
    check.fail(
        "the input's features must be a multiple of group_size but got " + std::to_string(in_features) +
        " and " + std::to_string(q.group_size) + ".");
  }
  Arrays all;
  // Of other formats the rows alone are certain, which MLX leaves unchecked.
  auto add = [&](const char* name, const Parts& parts, int columns) {
    auto arrays = check_parts(check, name, parts, operands);
    bool codes = all.empty();
    for (int part = 0; part < operands.parts; ++part) {
      auto full_name = part_name(name, operands, part);
      if (!known) {
        check.rows(full_name, arrays[part], features[part]);
        continue;
      }
      check.shape(full_name, arrays[part], {features[part], columns});
      if (!codes && q.is_affine()) {
        check.floating(full_name, arrays[part]);
      } else {
        check.dtype(full_name, arrays[part], codes ? mx::uint32 : mx::uint8);
      }
    }
    all.insert(all.end(), arrays.begin(), arrays.end());
  };
  int groups = known ? in_features / q.group_size : 0;
  add("weight", weight, int(int64_t(in_features) * q.bits / 32));
  add("scales", quantized.scales, groups);
  if (quantized.biases) {
    add("biases", *quantized.biases, groups);
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
          "lora_a" + suffix + " and lora_b" + suffix + " must both be arrays or both None but got lora_" +
          (a ? "a" : "b") + suffix + " alone.");
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
    } else if (operands.quantization->has_biases) {
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
