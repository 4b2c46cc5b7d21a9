#pragma once

#include "mlx_fused/cross_entropy.h"
#include "mlx_fused/products.h"

// The loss of a head in MLX's own operations. Inputs and outputs are those of the primitives in
// cross_entropy.h.
namespace mlx_fused::composed {

// Which rows count, by their targets.
mx::array counted(const mx::array& targets, mx::Stream s);

// The losses, of logits that are all there at once: what the operation means. One whose target is no word is
// NaN.
mx::array cross_entropy(const Arrays& inputs, const LossCall& call, const Products& products);

// Losses and logarithms and, if it is asked for, x's gradient where all cotangents are 1. Of the logits no
// more than some blocks are there: each waits for the sums of the one before.
Arrays cross_entropy_by_blocks(
    const Arrays& inputs, const LossCall& call, bool with_dx, BlockSize size, mx::Stream s);

// x's gradient of that one where all cotangents are 1.
mx::array cross_entropy_scaled(
    const mx::array& cotangent, const mx::array& dx, const mx::array& targets, mx::Stream s);

// The wanted gradients, by blocks that are made again.
Arrays cross_entropy_grad_by_blocks(
    const Arrays& inputs, const LossCall& call, const Slots& wanted, BlockSize size, mx::Stream s);

}  // namespace mlx_fused::composed
