#include "mlx_fused/arguments.h"

#include <algorithm>
#include <numeric>

#include "mlx/ops.h"

namespace mlx_fused {

std::optional<Quantization> quantization(const Linear& layer) {
  if (!layer.scales) {
    return std::nullopt;
  }
  auto& mode = layer.mode;
  return with_defaults(mode, layer.bits, layer.group_size, layer.biases.has_value());
}

namespace {

// Sizes that we do not know are left for MLX to judge. But a mode with a fixed format accepts no other sizes,
// which MLX does not check.
void check_quantization(const Check& check, const Linear& layer, const Quantization& q) {
  auto* format = fixed_format(q.mode);
  auto check_size = [&](const char* name, const std::optional<int>& given, int Quantization::* size) {
    if (given) {
      check.positive({name}, *given);
    }
    if (format && q.*size != format->*size) {
      check.fail(name, " must be ", format->*size, " for mode '", q.mode, "' but got ", q.*size, ".");
    }
  };
  check_size("group_size", layer.group_size, &Quantization::group_size);
  check_size("bits", layer.bits, &Quantization::bits);
  if (is_known(q) && q.has_biases != q.is_affine()) {
    auto [must, got] = q.is_affine() ? std::pair("be given", "None") : std::pair("be None", "an array");
    check.fail("biases must ", must, " for mode '", q.mode, "' but got ", got, ".");
  }
}

// Checks one layer and lists its arrays.
template <typename Add>
struct LayerCheck {
  const Check& check;
  const Linear& layer;
  const int in_features, features;
  const int index;  // in a tuple of layers, -1 if there is one layer
  Add& add;         // called with a role and an array

  // In the order of input_slots.
  void add_all() {
    auto q = quantization(layer);
    q ? add_quantized(*q) : add_dense();
    if (layer.bias) {
      add_floating(Role::bias, "bias", *layer.bias, {features});
    }
    if (layer.lora_a.has_value() != layer.lora_b.has_value()) {
      Name a{"lora_a", index}, b{"lora_b", index}, given = layer.lora_a ? a : b;
      check.fail(a, " and ", b, " must both be arrays or both None but got ", given, " alone.");
    }
    if (layer.lora_a) {
      check.ndim({"lora_a", index}, *layer.lora_a, 2);
      int rank = layer.lora_a->shape(1);
      add_floating(Role::lora_a, "lora_a", *layer.lora_a, {in_features, rank});
      add_floating(Role::lora_b, "lora_b", *layer.lora_b, {rank, features});
    }
  }

  void add_floating(Role role, const char* name, const mx::array& array, const mx::Shape& shape) {
    check.floating({name, index}, array);
    check.shape({name, index}, array, shape);
    add(role, array);
  }

  void add_dense() {
    const char* given = layer.biases       ? "biases"
                        : layer.group_size ? "group_size"
                        : layer.bits       ? "bits"
                                           : "mode";
    if (layer.biases || layer.group_size || layer.bits || layer.mode != "affine") {
      check.fail(given, " must be left out if scales are None but got a value.");
    }
    add_floating(Role::weight, "weight", layer.weight, {features, in_features});
  }

  void add_quantized(const Quantization& q) {
    check_quantization(check, layer, q);
    bool known = is_known(q);
    if (known && in_features % q.group_size != 0) {
      auto must = "the input's features must be a multiple of group_size but got ";
      check.fail(must, in_features, " and ", q.group_size, ".");
    }
    auto add_part = [&](Role role, const char* name, const mx::array& array, int columns, bool is_affine) {
      if (!known) {
        check.rows({name, index}, array, features);  // true of every format, and MLX does not check it
      } else if (is_affine) {
        add_floating(role, name, array, {features, columns});
        return;
      } else {
        check.shape({name, index}, array, {features, columns});
        check.dtype({name, index}, array, role == Role::weight ? mx::uint32 : mx::uint8);
      }
      add(role, array);
    };
    int codes = int(int64_t(in_features) * q.bits / 32), groups = known ? in_features / q.group_size : 0;
    add_part(Role::weight, "weight", layer.weight, codes, false);
    add_part(Role::group_scales, "scales", *layer.scales, groups, q.is_affine());
    if (layer.biases) {
      add_part(Role::group_biases, "biases", *layer.biases, groups, q.is_affine());
    }
  }
};

// The rows of each segment.
Arrays split_rows(
    const mx::array& packed, const std::vector<int>& features, Packing packing, const Products& products) {
  if (packing == Packing::interleaved) {
    int count = features.size();
    auto turns = mx::unflatten(packed, 0, {features[0], count}, products.stream);
    auto parts = products.split(mx::swapaxes(turns, 0, 1, products.stream), std::vector(count, 1));
    for (auto& part : parts) {
      part = mx::squeeze(part, 0, products.stream);
    }
    return parts;
  }
  if (packing == Packing::in_order) {
    return products.split(packed, features);
  }
  auto parts = products.split(packed, {features.rbegin(), features.rend()});
  return {parts.rbegin(), parts.rend()};
}

// Splits an array of a packed layer into the segments' parts. They share lora_a; lora_b is split by columns.
Arrays unpacked(
    Role role,
    const mx::array& array,
    const std::vector<int>& features,
    Packing packing,
    const Products& products) {
  if (role == Role::lora_a) {
    return Arrays(features.size(), array);
  }
  if (role != Role::lora_b) {
    return split_rows(array, features, packing, products);
  }
  auto parts = split_rows(mx::transpose(array, products.stream), features, packing, products);
  for (auto& part : parts) {
    part = mx::transpose(part, products.stream);
  }
  return parts;
}

}  // namespace

std::optional<std::string> difference(const Linears& layers) {
  if (layers.size() == 1) {
    return std::nullopt;
  }
  auto differ = [&](auto&& of) {
    auto first = of(layers[0]);
    return std::any_of(layers.begin() + 1, layers.end(), [&](auto& l) { return of(l) != first; });
  };
  auto list = [&](auto&& text) {
    std::string all;
    for (auto& layer : layers) {
      all += (all.empty() ? "" : ", ") + text(layer);
    }
    return all;
  };
  if (differ(quantization)) {
    return "quantization differs: " + list([](auto& l) {
             auto q = quantization(l);
             return q ? to_string(*q) : "none";
           });
  }
  auto columns = [](auto& l) { return l.weight.shape(-1); };
  if (differ(columns)) {
    return "input sizes differ: (" + list([&](auto& l) { return std::to_string(columns(l)); }) + ")";
  }
  if (differ([](auto& l) { return l.bias.has_value(); })) {
    return "only some have a bias";
  }
  return std::nullopt;
}

Arrays check_arguments(
    const Check& check,
    const std::string& input_name,
    const mx::array& input,
    const std::optional<NormOperands>& norm,
    const Linears& layers,
    const std::optional<mx::array>& residual,
    Call& call,
    const Products& products,
    Packing packing) {
  check.ndim({input_name.c_str()}, input, 3);
  check.floating({input_name.c_str()}, input);
  auto& segments = call.segments;
  bool packed = layers.size() == 1 && segments.size() > 1;
  if (!packed && layers.size() != segments.size()) {
    check.fail("weight must be one layer or a tuple of ", segments.size(), " but got ", layers.size(), ".");
  }
  auto index = [&](size_t i) { return layers.size() == 1 ? -1 : int(i); };
  std::vector<int> features;
  for (size_t i = 0; i < segments.size(); ++i) {
    if (segments[i].features == 0) {
      // A gate has as many rows as what it is multiplied with.
      auto& weight = layers.at(call.epilogue.activation.gated ? 0 : i).weight;
      if (!packed) {
        check.ndim({"weight", index(i)}, weight, 2);
      }
      segments[i].features = weight.ndim() == 0 ? 0 : weight.shape(0) / (packed ? segments.size() : 1);
    }
    if (segments.size() > 1) {
      check.positive({"the rows of weight", index(i)}, segments[i].features);
    }
    features.push_back(segments[i].features);
  }
  // In the order of input_slots, but for the parts of a packed layer.
  Arrays arrays;
  Slots slots;
  arrays.reserve(3 + 6 * segments.size());
  auto add = [&](Role role, int segment, mx::array array) {
    if (packed) {
      slots.push_back({role, segment});
    }
    arrays.push_back(std::move(array));
  };
  add(Role::input, 0, input);
  if (norm) {
    auto& [weight, eps] = *norm;
    call.norm = {.eps = eps, .has_weight = weight.has_value()};
    if (weight) {
      check.shape({"norm", 0}, *weight, {input.shape(-1)});
      check.floating({"norm", 0}, *weight);
      add(Role::norm_weight, 0, *weight);
    }
  }
  call.quantization = quantization(layers[0]);
  for (int i = 0; i < int(layers.size()); ++i) {
    auto add_parts = [&](Role role, const mx::array& array) {
      if (!packed) {
        add(role, i, array);
        return;
      }
      auto parts = unpacked(role, array, features, packing, products);
      for (int j = 0; j < int(parts.size()); ++j) {
        add(role, j, std::move(parts[j]));
      }
    };
    int rows = packed ? std::accumulate(features.begin(), features.end(), 0) : features[i];
    LayerCheck<decltype(add_parts)>{check, layers[i], input.shape(-1), rows, index(i), add_parts}.add_all();
  }
  for (size_t i = 0; i < segments.size(); ++i) {
    auto& layer = layers[packed ? 0 : i];
    segments[i].adapter_scale = layer.lora_a ? std::optional(layer.lora_scale) : std::nullopt;
  }
  if (auto reason = difference(layers)) {
    check.fail("the layers in weight must be alike but ", *reason, ".");
  }
  call.has_bias = layers[0].bias.has_value();
  if (residual) {
    check.shape({"residual"}, *residual, {input.shape(0), input.shape(1), features[0]});
    check.floating({"residual"}, *residual);
    add(Role::residual, 0, *residual);
    call.epilogue.has_residual = true;
  }

  if (!packed) {
    return arrays;
  }
  Operands operands(arrays, slots);
  Arrays inputs;
  for (auto [role, segment] : input_slots(call)) {
    inputs.push_back(operands.get(role, segment));
  }
  return inputs;
}

Arrays check_table(const Check& check, const Linear& table) {
  if (table.bias || table.lora_a || table.lora_b) {
    check.fail(
        "weight must have neither a bias nor an adapter but got ", table.bias ? "a bias." : "an adapter.");
  }
  check.ndim({"weight"}, table.weight, 2);
  if (table.scales) {
    check.ndim({"scales"}, *table.scales, 2);
  }
  auto q = quantization(table);
  int cols = q ? table.scales->shape(1) * q->group_size : table.weight.shape(1);
  Arrays arrays;
  auto add = [&](Role, const mx::array& a) { arrays.push_back(a); };
  LayerCheck<decltype(add)>{check, table, cols, table.weight.shape(0), -1, add}.add_all();
  return arrays;
}

}  // namespace mlx_fused
