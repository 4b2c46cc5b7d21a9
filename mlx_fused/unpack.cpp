#include "mlx_fused/unpack.h"

#include "mlx/ops.h"
#include "mlx_fused/fused_primitive.h"

namespace mlx_fused {

namespace {

class Unpack : public FusedPrimitive {
 public:
  Unpack(mx::Stream stream, std::vector<int> rows) : FusedPrimitive(stream), rows_(std::move(rows)) {}

  void eval_cpu(const Arrays& inputs, Arrays& outputs) override {
    share(inputs[0], outputs);
  }
  void eval_gpu(const Arrays& inputs, Arrays& outputs) override {
    share(inputs[0], outputs);
  }
  std::vector<mx::Shape> output_shapes(const Arrays& inputs) override {
    std::vector<mx::Shape> shapes;
    for (int n : rows_) {
      shapes.push_back(inputs[0].shape());
      shapes.back()[0] = n;
    }
    return shapes;
  }
  DEFINE_NAME(Unpack)

 protected:
  Function composed() override {
    return
        [rows = rows_, s = stream()](const Arrays& inputs) { return mx::split(inputs[0], ends(rows), 0, s); };
  }
  Arrays apply(const Arrays& inputs) override {
    return composed()(inputs);
  }

 private:
  static void share(const mx::array& packed, Arrays& outputs) {
    int64_t offset = 0;
    for (auto& out : outputs) {
      auto flags = packed.flags();
      flags.contiguous = flags.row_contiguous;  // a slice of rows has no gaps only if the rows have none
      flags.col_contiguous &= packed.ndim() == 1;
      out.copy_shared_buffer(packed, packed.strides(), flags, out.size(), offset);
      offset += out.shape(0) * packed.strides(0);
    }
  }

  const std::vector<int> rows_;
};

}  // namespace

Arrays unpack(const mx::array& packed, const std::vector<int>& rows, mx::Stream stream) {
  auto primitive = std::make_shared<Unpack>(stream, rows);
  std::vector<mx::Dtype> dtypes(rows.size(), packed.dtype());
  return mx::array::make_arrays(primitive->output_shapes({packed}), dtypes, primitive, {packed});
}

mx::Shape ends(const std::vector<int>& rows) {
  mx::Shape ends = {rows[0]};
  for (size_t i = 1; i + 1 < rows.size(); ++i) {
    ends.push_back(ends.back() + rows[i]);
  }
  return ends;
}

}  // namespace mlx_fused
