#pragma once

#include <algorithm>
#include <memory>
#include <utility>
#include <vector>

#include "mlx/ops.h"
#include "mlx_fused/fused_primitive.h"

namespace mlx_fused {

// A primitive whose outputs MLX's operations compute: it takes the inputs of Base and then the outputs, which
// it passes on. So they have Base's transforms, where MLX would transform operation by operation.
template <typename Base>
class Computed : public Base {
 public:
  template <typename... Args>
  explicit Computed(size_t inputs, Args&&... args) : Base(std::forward<Args>(args)...), inputs_(inputs) {}

  void eval_cpu(const Arrays& inputs, Arrays& outputs) override {
    pass_on(inputs, outputs);
  }
  void eval_gpu(const Arrays& inputs, Arrays& outputs) override {
    pass_on(inputs, outputs);
  }
  Arrays vjp(
      const Arrays& primals,
      const Arrays& cotangents,
      const std::vector<int>& argnums,
      const Arrays& outputs) override {
    return Base::vjp(without_outputs(primals), cotangents, argnums, outputs);
  }
  Arrays jvp(const Arrays& primals, const Arrays& tangents, const std::vector<int>& argnums) override {
    return Base::jvp(without_outputs(primals), tangents, argnums);
  }
  std::pair<Arrays, std::vector<int>> vmap(const Arrays& inputs, const std::vector<int>& axes) override {
    return Base::vmap(without_outputs(inputs), without_outputs(axes));
  }
  std::vector<mx::Shape> output_shapes(const Arrays& inputs) override {
    return Base::output_shapes(without_outputs(inputs));
  }

 protected:
  // The outputs of a primitive of type P, which is constructed with `args`.
  template <typename P, typename... Args>
  static Arrays made(const Arrays& inputs, const Arrays& outputs, mx::Stream s, Args&&... args) {
    auto all = inputs;
    std::vector<mx::Shape> shapes;
    std::vector<mx::Dtype> dtypes;
    for (auto& y : outputs) {
      shapes.push_back(y.shape());
      dtypes.push_back(y.dtype());
      all.push_back(mx::stop_gradient(y, s));
    }
    auto primitive = std::make_shared<P>(inputs.size(), s, std::forward<Args>(args)...);
    return mx::array::make_arrays(shapes, dtypes, primitive, all);
  }

  // Lets other arrays compute the outputs, which must not be evaluated yet.
  void compute_by(const Arrays& computed, const Arrays& outputs) {
    Arrays stopped;
    for (auto& y : computed) {
      stopped.push_back(mx::stop_gradient(y, this->stream()));
    }
    for (auto out : outputs) {  // which share their inputs: MLX counts those of only one
      std::copy(stopped.begin(), stopped.end(), out.inputs().begin() + inputs_);
    }
  }

  template <typename T>
  std::vector<T> without_outputs(const std::vector<T>& all) const {
    return {all.begin(), all.begin() + inputs_};
  }

 private:
  void pass_on(const Arrays& inputs, Arrays& outputs) {
    for (size_t i = 0; i < outputs.size(); ++i) {
      outputs[i].copy_shared_buffer(inputs[inputs_ + i]);
    }
  }

  const size_t inputs_;
};

}  // namespace mlx_fused
