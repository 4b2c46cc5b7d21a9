#pragma once

#include "mlx_fused/call.h"
#include "mlx_fused/fused_primitive.h"

// The rows of a table, such as the embeddings of words.
namespace mlx_fused {

// The rows of `table`, which is a weight and, if it is quantized, its scales and perhaps biases. Places are
// integers below the number of rows; negative ones count from its end. A primitive of ours where that is some
// fifty operations, for quantized tables on the CPU; MLX's own elsewhere.
mx::array embedding(
    const mx::array& places, Arrays table, const std::optional<Quantization>& format, mx::Stream s);

// Takes the quantized table's arrays and int64 places.
class Embedding : public FusedPrimitive {
 public:
  Embedding(mx::Stream stream, Quantization format) : FusedPrimitive(stream), format_(std::move(format)) {}

  void eval_cpu(const Arrays& inputs, Arrays& outputs) override;
  std::pair<Arrays, std::vector<int>> vmap(const Arrays& inputs, const std::vector<int>& axes) override;
  std::vector<mx::Shape> output_shapes(const Arrays& inputs) override;
  bool is_equivalent(const mx::Primitive& other) const override {
    return format_ == static_cast<const Embedding&>(other).format_;
  }
  DEFINE_NAME(FusedEmbedding)

 protected:
  Function composed() override;
  Arrays apply(const Arrays& inputs) override;

 private:
  const Quantization format_;
};

}  // namespace mlx_fused
