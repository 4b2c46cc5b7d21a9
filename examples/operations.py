"""Calls the operations themselves, with gradients, and compares them with MLX's own.

python examples/operations.py
"""

import mlx.core as mx
import mlx.nn as nn

import mlx_fused
from mlx_fused import LinearOperands

B, S, H, HEADS, KV_HEADS, HEAD_DIM = 2, 16, 256, 8, 2, 32
SIZES = HEADS * HEAD_DIM, KV_HEADS * HEAD_DIM, KV_HEADS * HEAD_DIM
mx.random.seed(0)
x = mx.random.normal((B, S, H))
weights = tuple(mx.random.normal((n, H)) / H**0.5 for n in SIZES)
heads = {"num_heads": HEADS, "num_kv_heads": KV_HEADS, "head_dim": HEAD_DIM}


def show(what, ours, theirs):
    differences = [(mx.abs(a - b).max() / mx.abs(b).max()).item() for a, b in zip(ours, theirs, strict=True)]
    print(f"{what:38}differs from MLX's own operations by {max(differences):.0e}")


def split_heads(y):
    return y.reshape(B, S, -1, HEAD_DIM).swapaxes(1, 2)


# Dense weights: three products, split into heads, are one operation.
def stock(x, *weights):
    return [split_heads(x @ w.T) for w in weights]


def fused(x, *weights):
    return list(mlx_fused.fused_qkv_projection(x, weights, **heads))


show("QKV", fused(x, *weights), stock(x, *weights))

# All gradients are one operation too.
primals, cotangents = [x, *weights], [mx.random.normal(y.shape) for y in stock(x, *weights)]
show("QKV, gradients", mx.vjp(fused, primals, cotangents)[1], mx.vjp(stock, primals, cotangents)[1])

# Quantized weights and LoRA: all arrays of a linear layer are one value.
codes = [mx.quantize(w, group_size=64, bits=4) for w in weights]
adapters = [(mx.random.normal((H, 8)) / H**0.5, mx.random.normal((n, 8)).T) for n in SIZES]


def stock_qlora(x, *adapters):
    parts = zip(codes, adapters[::2], adapters[1::2], strict=True)
    products = [(mx.quantized_matmul(x, *c, group_size=64, bits=4), (x @ a) @ b) for c, a, b in parts]
    return [split_heads(y + 2.0 * z) for y, z in products]


def fused_qlora(x, *adapters):
    layers = tuple(
        LinearOperands(w, None, scales, biases, 64, 4, lora_a=a, lora_b=b, lora_scale=2.0)
        for (w, scales, biases), a, b in zip(codes, adapters[::2], adapters[1::2], strict=True)
    )
    return list(mlx_fused.fused_qkv_projection(x, layers, **heads))


primals = [x, *(array for pair in adapters for array in pair)]
show("QKV, 4 bits and LoRA", fused_qlora(*primals), stock_qlora(*primals))
ours, theirs = (mx.vjp(f, primals, cotangents)[1] for f in (fused_qlora, stock_qlora))
show("QKV, 4 bits and LoRA, gradients", ours, theirs)

# The output projection adds the residual. Any transform of MLX works.
attention_output, residual, wo = mx.random.normal((B, S, HEADS * HEAD_DIM)), x, weights[0].T


def fused_loss(wo):
    y = mlx_fused.fused_output_projection_residual(attention_output, wo, residual=residual)
    return y.square().mean()


def stock_loss(wo):
    return (residual + attention_output @ wo.T).square().mean()


ours, theirs = (mx.compile(mx.value_and_grad(f))(wo) for f in (fused_loss, stock_loss))
show("output + residual, compiled gradient", ours, theirs)

# The gated half of an MLP, and its gradients: gate and up, the activation and the product are one operation.
gate_up = [mx.random.normal((2 * H, H)) / H**0.5 for _ in range(2)]


def stock_gated(x, gate, up):
    return [nn.silu(x @ gate.T) * (x @ up.T)]


def fused_gated(x, gate, up):
    return [mlx_fused.fused_gated_projection(x, (gate, up), activation="silu")]


primals, cotangents = [x, *gate_up], [mx.random.normal((B, S, 2 * H))]
show("gate and up", fused_gated(*primals), stock_gated(*primals))
ours, theirs = (mx.vjp(f, primals, cotangents)[1] for f in (fused_gated, stock_gated))
show("gate and up, gradients", ours, theirs)
