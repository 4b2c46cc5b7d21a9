#include "mlx_fused/composed_cross_entropy.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <memory>
#include <optional>

#include "mlx/ops.h"
#include "mlx_fused/backend/cpu/cross_entropy.h"
#include "mlx_fused/composed.h"
#include "mlx_fused/fused_primitive.h"

namespace mlx_fused::composed {

namespace {

constexpr int least_words = 64;

constexpr float infinity = std::numeric_limits<float>::infinity();
constexpr float nan = std::numeric_limits<float>::quiet_NaN();

mx::array number(float value) {
  return mx::array(value, mx::float32);
}

mx::array as_column(const mx::array& a, mx::Stream s) {
  return mx::expand_dims(a, -1, s);
}

mx::array exp_of(const mx::array& a, const mx::array& less, mx::Stream s) {
  return mx::exp(mx::subtract(a, less, s), s);
}

// Its first input, when the others are there. MLX's Depends has neither vmap nor jvp, which go through
// blocks though nothing needs the results.
class After : public FusedPrimitive {
 public:
  using FusedPrimitive::FusedPrimitive;

  static mx::array of(const mx::array& a, const Arrays& others, mx::Stream s) {
    Arrays inputs = {a};
    inputs.insert(inputs.end(), others.begin(), others.end());
    return {a.shape(), a.dtype(), std::make_shared<After>(s), inputs};
  }

  void eval_cpu(const Arrays& inputs, Arrays& outputs) override {
    outputs[0].copy_shared_buffer(inputs[0]);
  }
  void eval_gpu(const Arrays& inputs, Arrays& outputs) override {
    outputs[0].copy_shared_buffer(inputs[0]);
  }
  DEFINE_NAME(After)

 protected:
  Function composed() override {
    return [](const Arrays& inputs) { return Arrays{inputs[0]}; };
  }
  Arrays apply(const Arrays& inputs) override {
    return {of(inputs[0], {inputs.begin() + 1, inputs.end()}, stream())};
  }
};

// Sums of nothing but -inf count as 0 in an exponent, which so stays -inf.
mx::array above_minus_infinity(const mx::array& log_sum, mx::Stream s) {
  return mx::where(mx::equal(log_sum, number(-infinity), s), number(0), log_sum, s);
}

// x, of rows that do not count 0: else a NaN there would reach the gradients.
mx::array counted_rows(const mx::array& x, const mx::array& targets, mx::Stream s) {
  return mx::where(as_column(counted(targets, s), s), x, mx::array(0, x.dtype()), s);
}

// At least in float32.
mx::array logits_of(const Arrays& head, const LossCall& call, const Products& products) {
  auto s = products.stream;
  auto y = project(head, call.head, products)[0];
  y = mx::astype(y, mx::promote_types(y.dtype(), mx::float32), s);
  if (call.softcap == 0) {
    return y;
  }
  mx::array cap(call.softcap, y.dtype());
  return mx::multiply(cap, mx::tanh(mx::divide(y, cap, s), s), s);
}

struct Range {
  int begin, end;

  int size() const {
    return end - begin;
  }
};

std::vector<Range> ranges(int size, int step) {
  std::vector<Range> all;
  for (int begin = 0; begin < size; begin += step) {
    all.push_back({begin, std::min(begin + step, size)});
  }
  return all;
}

mx::array slice(const mx::array& a, int axis, Range range, mx::Stream s) {
  if (range.size() == a.shape(axis)) {
    return a;
  }
  mx::Shape begin(a.ndim(), 0), end = a.shape();
  begin[axis] = range.begin, end[axis] = range.end;
  return mx::slice(a, begin, end, s);
}

// The axis of an operand that the words are along, or -1.
int axis_of_words(Role role) {
  return role == Role::lora_b ? 1 : role == Role::input || role == Role::lora_a ? -1 : 0;
}

// A head's logits by blocks, of some rows and words each. A block's products wait for the arrays in `before`,
// which are to be made of the block before it: MLX would make all blocks at once, and hold them.
class Blocks {
 public:
  // One of x's blocks of rows.
  struct Rows {
    Range range;
    mx::array x, targets, counts;  // [1, rows, in_features], and a column each
  };

  struct Block {
    Arrays operands;       // of the head's part with these words
    Call head;             // that part
    mx::array logits;      // [rows, words]
    mx::array of_target;   // a column: the logit of a row's target, any other where that is no word of these
    mx::array has_target;  // a column
    mx::array is_target;   // [rows, words]
  };

  Blocks(const Arrays& inputs, const LossCall& call, BlockSize size, mx::Stream s)
      : s(s),
        call(call),
        products_(s),
        operands_(inputs.begin(), inputs.end() - 1),
        slots_(input_slots(call.head)) {
    auto x = mx::flatten(inputs[0], 0, 1, s), targets = as_column(mx::flatten(inputs.back(), s), s);
    int height = std::max(1, std::min(x.shape(0), size.rows));
    for (auto range : ranges(x.shape(0), height)) {
      auto of_rows = slice(targets, 0, range, s);
      auto part = counted_rows(slice(x, 0, range, s), mx::squeeze(of_rows, -1, s), s);
      rows.push_back({range, mx::expand_dims(part, 0, s), of_rows, counted(of_rows, s)});
    }
    words = ranges(call.head.segments[0].features, std::max(least_words, size.logits / height));
  }

  Block block(const Rows& rows, Range words) const {
    auto operands = operands_;
    operands[0] = before.empty() ? rows.x : After::of(rows.x, before, s);
    for (size_t i = 0; i < slots_.size(); ++i) {
      if (int axis = axis_of_words(slots_[i].role); axis >= 0) {
        operands[i] = slice(operands[i], axis, words, s);
      }
    }
    auto part = call;
    part.head.segments[0].features = words.size();
    auto logits = mx::flatten(logits_of(operands, part, products_), 0, 1, s);
    auto places = mx::subtract(rows.targets, mx::array(words.begin, mx::int64), s);
    mx::array first(0, mx::int64), end(words.size(), mx::int64);
    auto has_target = mx::logical_and(mx::greater_equal(places, first, s), mx::less(places, end, s), s);
    return {
        .operands = std::move(operands),
        .head = std::move(part.head),
        .logits = logits,
        .of_target = mx::take_along_axis(logits, mx::where(has_target, places, first, s), -1, s),
        .has_target = has_target,
        .is_target = mx::equal(places, mx::arange(0, words.size(), mx::int64, s), s)};
  }

  // The gradient of the logits by the head's outputs: 1 without a softcap.
  mx::array times_slope(const mx::array& grad, const mx::array& logits) const {
    if (call.softcap == 0) {
      return grad;
    }
    auto part = mx::divide(logits, number(call.softcap), s);
    return mx::multiply(grad, mx::subtract(number(1), mx::square(part, s), s), s);
  }

  // The gradients of the block's operands, x's as [rows, in_features], in float32, where `grad` is that of
  // its outputs.
  Arrays gradients(const Block& block, const mx::array& grad, const Slots& wanted) const {
    GradCall of{block.head, wanted};
    Operands operands(block.operands, slots_);
    Arrays inputs;
    for (auto slot : input_slots(of)) {
      inputs.push_back(
          slot.role == Role::cotangent ? mx::expand_dims(mx::astype(grad, operands_[0].dtype(), s), 0, s)
                                       : operands.get(slot.role));
    }
    auto grads = project_grad(inputs, of, products_);
    for (size_t i = 0; i < grads.size(); ++i) {
      auto& g = grads[i];
      g = mx::astype(wanted[i].role == Role::input ? mx::squeeze(g, 0, s) : g, mx::float32, s);
    }
    return grads;
  }

  // Of every row the weight's row of its target, in float32. Of a target that is no word any row.
  mx::array weights_of(const mx::array& targets) const {
    Operands operands(operands_, slots_);
    mx::array first(0, mx::int64), last(call.head.segments[0].features - 1, mx::int64);
    auto places = mx::squeeze(mx::clip(targets, first, last, s), -1, s);
    auto of = [&](Role role) { return mx::take(operands.get(role), places, 0, s); };
    auto weight = of(Role::weight);
    if (auto& q = call.head.quantization) {
      auto biases = q->has_biases ? std::optional(of(Role::group_biases)) : std::nullopt;
      auto scales = of(Role::group_scales);
      weight = mx::dequantize(
          weight, scales, biases, q->group_size, q->bits, q->mode, std::nullopt, std::nullopt, s);
    }
    return mx::astype(weight, mx::float32, s);
  }

  const mx::Stream s;
  const LossCall& call;
  std::vector<Rows> rows;
  std::vector<Range> words;
  Arrays before;

 private:
  const Products products_;
  const Arrays operands_;
  const Slots slots_;
};

// The gradient of an operand: sums over blocks, apart for every block of its rows or words.
class Gradient {
 public:
  Gradient(const mx::array& operand, Role role, size_t parts, mx::Stream s)
      : operand_(operand), axis_(std::max(0, axis_of_words(role))), parts_(parts), s_(s) {}

  // Gives the array that a block was added to.
  const mx::array& add(const mx::array& grad, int part, bool is_last) {
    auto& sum = parts_[part];
    sum = sum ? mx::add(*sum, grad, s_) : grad;
    if (is_last) {
      sum = mx::astype(*sum, operand_.dtype(), s_);
    }
    return *sum;
  }

  mx::array all() const {
    Arrays parts;
    for (auto& sum : parts_) {
      parts.push_back(mx::astype(*sum, operand_.dtype(), s_));
    }
    return mx::reshape(mx::concatenate(parts, axis_, s_), operand_.shape(), s_);
  }

 private:
  const mx::array& operand_;
  int axis_;
  std::vector<std::optional<mx::array>> parts_;
  mx::Stream s_;
};

}  // namespace

mx::array counted(const mx::array& targets, mx::Stream s) {
  return mx::not_equal(targets, mx::array(cpu::ignored, mx::int64), s);
}

mx::array cross_entropy(const Arrays& inputs, const LossCall& call, const Products& products) {
  auto s = products.stream;
  auto& targets = inputs.back();
  if (targets.size() == 0) {
    return mx::zeros(targets.shape(), s);  // MLX has no logsumexp of nothing
  }
  Arrays of_head(inputs.begin(), inputs.end() - 1);
  of_head[0] = counted_rows(of_head[0], targets, s);
  auto logits = logits_of(of_head, call, products);
  auto number = [&](float value) { return mx::array(value, logits.dtype()); };
  int words = logits.shape(-1);
  auto is_word =
      mx::logical_and(mx::greater_equal(targets, mx::array(0), s), mx::less(targets, mx::array(words), s), s);
  auto places = as_column(mx::where(is_word, targets, mx::array(0, mx::int64), s), s);
  auto of_target = mx::squeeze(mx::take_along_axis(logits, places, -1, s), -1, s);
  of_target = mx::where(is_word, of_target, number(nan), s);
  auto losses = mx::subtract(
      mx::logsumexp(logits, -1, false, s), mx::multiply(number(1 - call.smoothing), of_target, s), s);
  if (call.smoothing != 0) {
    auto mean = mx::mean(logits, -1, false, s);
    losses = mx::subtract(losses, mx::multiply(number(call.smoothing), mean, s), s);
  }
  return mx::where(counted(targets, s), losses, number(0), s);
}

Arrays cross_entropy_by_blocks(
    const Arrays& inputs, const LossCall& call, bool with_dx, BlockSize size, mx::Stream s) {
  Blocks blocks(inputs, call, size, s);
  Arrays losses, log_sums, dx;
  for (auto& rows : blocks.rows) {
    auto of_target = mx::full(rows.targets.shape(), number(nan), s);  // of a target that is no word
    auto log_sum = mx::full(rows.targets.shape(), number(-infinity), s);
    auto sum = number(0);
    auto products = number(0);  // of p and the weight's rows, without the targets'
    for (auto words : blocks.words) {
      auto block = blocks.block(rows, words);
      auto last = log_sum;
      log_sum = mx::logaddexp(last, mx::logsumexp(block.logits, -1, true, s), s);
      of_target = mx::where(block.has_target, block.of_target, of_target, s);
      blocks.before = {log_sum, of_target};
      if (call.smoothing != 0) {
        sum = mx::add(sum, mx::sum(block.logits, -1, true, s), s);
        blocks.before.push_back(sum);
      }
      if (with_dx) {
        auto less = above_minus_infinity(log_sum, s);
        auto p = blocks.times_slope(exp_of(block.logits, less, s), block.logits);
        auto of_others = mx::where(block.is_target, number(0), p, s);
        auto product = blocks.gradients(block, of_others, {{Role::input}})[0];
        products = mx::add(mx::multiply(products, exp_of(last, less, s), s), product, s);
        blocks.before.push_back(products);
      }
    }
    auto loss = mx::subtract(log_sum, mx::multiply(number(1 - call.smoothing), of_target, s), s);
    if (call.smoothing != 0) {
      auto share = number(call.smoothing / call.head.segments[0].features);
      loss = mx::subtract(loss, mx::multiply(share, sum, s), s);
    }
    losses.push_back(mx::where(rows.counts, loss, number(0), s));
    log_sums.push_back(log_sum);
    if (with_dx) {
      // p - 1 is rounded once: where the model is nearly certain, little is left of it.
      auto p = exp_of(of_target, above_minus_infinity(log_sum, s), s);
      auto grad = blocks.times_slope(mx::subtract(p, number(1), s), of_target);
      grad = mx::where(mx::isnan(of_target, s), number(0), grad, s);
      auto share = mx::multiply(grad, blocks.weights_of(rows.targets), s);
      share = mx::multiply(number(call.head.epilogue.alpha), share, s);
      dx.push_back(mx::astype(mx::add(products, share, s), inputs[0].dtype(), s));
      blocks.before.push_back(dx.back());
    }
  }
  Arrays outputs = {
      mx::reshape(mx::concatenate(losses, 0, s), inputs.back().shape(), s),
      mx::reshape(mx::concatenate(log_sums, 0, s), inputs.back().shape(), s)};
  if (with_dx) {
    outputs.push_back(mx::reshape(mx::concatenate(dx, 0, s), inputs[0].shape(), s));
  }
  return outputs;
}

mx::array cross_entropy_scaled(
    const mx::array& cotangent, const mx::array& dx, const mx::array& targets, mx::Stream s) {
  auto scaled = mx::astype(mx::multiply(as_column(cotangent, s), dx, s), dx.dtype(), s);
  return mx::where(as_column(counted(targets, s), s), scaled, mx::array(0, dx.dtype()), s);
}

Arrays cross_entropy_grad_by_blocks(
    const Arrays& inputs, const LossCall& call, const Slots& wanted, BlockSize size, mx::Stream s) {
  Arrays of(inputs.begin() + 2, inputs.end());
  // The sums of a weight's gradient are done with before those of other words are begun: they are large.
  // Since each block adds to two sums then, blocks are square.
  bool by_words = contains(wanted, {Role::weight});
  if (by_words) {
    size.rows = std::sqrt(size.logits);
  }
  Blocks blocks(of, call, size, s);
  auto cotangents = as_column(mx::flatten(inputs[0], s), s),
       log_sums = as_column(mx::flatten(inputs[1], s), s);
  int outer = by_words ? blocks.words.size() : blocks.rows.size();
  int inner = by_words ? blocks.rows.size() : blocks.words.size();
  Operands operands(of, input_slots(call.head));
  std::vector<Gradient> grads;
  for (auto [role, segment] : wanted) {
    auto parts = role == Role::lora_a ? 1 : role == Role::input ? blocks.rows.size() : blocks.words.size();
    grads.emplace_back(operands.get(role), role, parts, s);
  }
  for (int i = 0; i < outer; ++i) {
    for (int j = 0; j < inner; ++j) {
      auto& rows = blocks.rows[by_words ? j : i];
      auto words = blocks.words[by_words ? i : j];
      auto block = blocks.block(rows, words);
      auto p = exp_of(block.logits, slice(log_sums, 0, rows.range, s), s);
      auto target = mx::where(block.is_target, number(1 - call.smoothing), number(0), s);
      auto grad = mx::subtract(p, target, s);
      if (call.smoothing != 0) {
        grad = mx::subtract(grad, number(call.smoothing / call.head.segments[0].features), s);
      }
      grad = mx::multiply(blocks.times_slope(grad, block.logits), slice(cotangents, 0, rows.range, s), s);
      auto parts = blocks.gradients(block, mx::where(rows.counts, grad, number(0), s), wanted);
      blocks.before.clear();
      for (size_t k = 0; k < wanted.size(); ++k) {
        auto role = wanted[k].role;
        bool in_turn = by_words ? axis_of_words(role) >= 0 : role == Role::input;
        int part = role == Role::lora_a ? 0 : in_turn ? i : j;
        blocks.before.push_back(grads[k].add(parts[k], part, in_turn && j + 1 == inner));
      }
    }
  }
  Arrays outputs;
  for (auto& grad : grads) {
    outputs.push_back(grad.all());
  }
  return outputs;
}

}  // namespace mlx_fused::composed
