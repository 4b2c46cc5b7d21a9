#include "mlx_fused/arguments.h"

#include <numeric>

namespace mlx_fused {

namespace {

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

// Looks at one call's arguments and collects its arrays.
class Arguments {
 public:
  Arguments(const Check& check, bool packed, Call& call, const Products& products)
      : check_(check), call_(call), packed_(packed), products_(products) {
    for (auto& segment : call.segments) {
      features_.push_back(segment.features);
    }
  }

  // One array for each segment, or one that packs their rows; `check` looks at an array of so many rows.
  template <typename CheckArray>
  void add(Role role, const std::string& name, const Parts& parts, CheckArray&& check) {
    auto* array = std::get_if<mx::array>(&parts);
    auto given = array ? Arrays{*array} : std::get<Arrays>(parts);
    size_t expected = packed_ ? 1 : features_.size();
    if (bool(array) != packed_ || given.size() != expected) {
      check_.fail(
          name +
          (packed_ ? " must be one packed array as weight is"
                   : " must be a tuple of three arrays (q, k, v)") +
          " but got " + (array ? "one array." : "a tuple of " + std::to_string(given.size()) + "."));
    }
    for (size_t i = 0; i < given.size(); ++i) {
      int rows = packed_ ? std::accumulate(features_.begin(), features_.end(), 0) : features_[i];
      check(packed_ ? name : name + "[" + std::to_string(i) + "]", given[i], rows);
    }
    if (packed_ && features_.size() > 1) {
      given = products_.split(given[0], features_);
    }
    for (size_t i = 0; i < given.size(); ++i) {
      add(role, int(i), given[i]);
    }
  }

  void add_dense(Role role, const std::string& name, const Parts& parts, std::optional<int> columns) {
    add(role, name, parts, [&](const std::string& full_name, const mx::array& a, int rows) {
      check_.floating(full_name, a);
      check_.shape(full_name, a, columns ? mx::Shape{rows, *columns} : mx::Shape{rows});
    });
  }

  void add_quantized(const Parts& weight, const QuantizedParts& quantized, int in_features) {
    auto q = check_quantization(check_, quantized);
    bool known = is_known(q);
    if (known && in_features % q.group_size != 0) {
      check_.fail(
          "the input's features must be a multiple of group_size but got " + std::to_string(in_features) +
          " and " + std::to_string(q.group_size) + ".");
    }
    auto check_array = [&](int columns, std::optional<mx::Dtype> dtype) {
      return [=, this](const std::string& name, const mx::array& a, int rows) {
        if (!known) {
          check_.rows(name, a, rows);  // alone certain, and unchecked by MLX
          return;
        }
        check_.shape(name, a, {rows, columns});
        dtype ? check_.dtype(name, a, *dtype) : check_.floating(name, a);
      };
    };
    int codes = int(int64_t(in_features) * q.bits / 32), groups = known ? in_features / q.group_size : 0;
    auto check_groups = check_array(groups, q.is_affine() ? std::nullopt : std::optional(mx::uint8));
    add(Role::weight, "weight", weight, check_array(codes, mx::uint32));
    add(Role::group_scales, "scales", quantized.scales, check_groups);
    if (quantized.biases) {
      add(Role::group_biases, "biases", *quantized.biases, check_groups);
    }
    call_.quantization = q;
  }

  void add_adapters(const Adapters& adapters, int in_features) {
    size_t segments = features_.size();
    for (auto [name, count] :
         {std::pair("lora_a", adapters.a.size()), std::pair("lora_b", adapters.b.size())}) {
      if (count != segments) {
        check_.fail(
            std::string(name) +
            " must be a tuple of three, an array or None for each of q, k and v, but got a tuple of " +
            std::to_string(count) + ".");
      }
    }
    if (adapters.scale.size() != 1 && adapters.scale.size() != segments) {
      check_.fail(
          "scale must be a number or a tuple of three but got a tuple of " +
          std::to_string(adapters.scale.size()) + ".");
    }
    for (size_t i = 0; i < segments; ++i) {
      auto suffix = segments == 1 ? "" : "[" + std::to_string(i) + "]";
      auto &a = adapters.a[i], &b = adapters.b[i];
      if (a.has_value() != b.has_value()) {
        check_.fail(
            "lora_a" + suffix + " and lora_b" + suffix + " must both be arrays or both None but got lora_" +
            (a ? "a" : "b") + suffix + " alone.");
      }
      if (a) {
        check_.ndim("lora_a" + suffix, *a, 2);
        check_.shape("lora_a" + suffix, *a, {in_features, a->shape(1)});
        check_.floating("lora_a" + suffix, *a);
        check_.shape("lora_b" + suffix, *b, {a->shape(1), features_[i]});
        check_.floating("lora_b" + suffix, *b);
        call_.segments[i].adapter_scale = adapters.scale[adapters.scale.size() == 1 ? 0 : i];
        add(Role::lora_a, int(i), *a);
        add(Role::lora_b, int(i), *b);
      }
    }
    if (!call_.has_adapters()) {
      check_.fail("lora_a must hold at least one array but got None for every segment.");
    }
  }

  void add(Role role, int segment, const mx::array& array) {
    slots_.push_back({role, segment});
    arrays_.push_back(array);
  }

  Arrays in_order() const {
    Operands operands(arrays_, slots_);
    Arrays inputs;
    for (auto [role, segment] : input_slots(call_)) {
      inputs.push_back(operands.get(role, segment));
    }
    return inputs;
  }

 private:
  const Check& check_;
  Call& call_;
  bool packed_;
  const Products& products_;
  std::vector<int> features_;
  Arrays arrays_;
  Slots slots_;
};

}  // namespace

Arrays check_arguments(
    const Check& check,
    const mx::array& input,
    const Weights& weights,
    const mx::array* residual,
    Call& call,
    const Products& products) {
  int in_features = input.shape(-1);
  Arguments arguments(check, std::holds_alternative<mx::array>(weights.weight), call, products);
  arguments.add(Role::input, 0, input);
  if (weights.quantized) {
    arguments.add_quantized(weights.weight, *weights.quantized, in_features);
  } else {
    arguments.add_dense(Role::weight, "weight", weights.weight, in_features);
  }
  if (weights.bias) {
    arguments.add_dense(Role::bias, "bias", *weights.bias, std::nullopt);
  }
  call.has_bias = weights.bias.has_value();
  if (weights.adapters) {
    arguments.add_adapters(*weights.adapters, in_features);
  }
  if (residual) {
    arguments.add(Role::residual, 0, *residual);
  }
  call.epilogue.has_residual = residual != nullptr;
  return arguments.in_order();
}

}  // namespace mlx_fused
