"""Patching a model that is sharded over several processes."""

import json

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

import mlx_fused
import ring
from oracle import UNIT_ROUNDOFF
from tiny_models import LAYERS, WIDEST, loss, make, tokens


def tensor_parallel():
    model = make("llama")
    nn.quantize(model.layers[0].self_attn, 32, 4)
    model.shard(mx.distributed.init())
    return model


def fully_sharded():
    model = make("llama")
    for layer in model.layers:
        layer.self_attn = nn.fully_shard(layer.self_attn)
    model.freeze()  # sockets cannot sum up the shards' gradients
    model.model.norm.unfreeze()
    return model


OBSTACLES = {
    tensor_parallel: ["o_proj is QuantizedShardedToAllLinear", "o_proj is ShardedToAllLinear"],
    fully_sharded: ["FullyShardedModule does not call it"] * LAYERS,
}


def run(model):
    """How far the patched model's results are from its own, and what is fused."""
    inputs = tokens(2, 5)

    def results():
        value, gradients = nn.value_and_grad(model, loss)(model, inputs)
        return [model(inputs), value, *(g for _, g in tree_flatten(gradients))]

    stock = results()
    mx.eval(stock)
    report = mlx_fused.patch(model)  # which prints, on rank 0
    patched = results()
    mx.eval(patched)
    return {
        "differences": [distance(p, s) for p, s in zip(patched, stock, strict=True)],
        "calls": [[layer.qkv.calls.fused, layer.qkv.calls.fallen_back] for layer in report.layers],
        "obstacles": [layer.residual.obstacle for layer in report.layers],
    }


def distance(a, b):
    return (mx.linalg.norm(a - b) / mx.linalg.norm(b)).item()


def test_two_processes(tmp_path):
    # As in test_models, the sums there and back, and two models that may be off as much.
    tolerance = 2 * 2 * LAYERS * 8 * WIDEST**0.5 * UNIT_ROUNDOFF[mx.float32]
    for out, err in ring.run(tmp_path, __file__):
        for results, obstacles in zip(json.loads(out), OBSTACLES.values(), strict=True):
            assert max(results["differences"]) <= tolerance
            assert results["calls"] == [[2, 0]] * LAYERS
            assert results["obstacles"] == obstacles
        assert "mlx-fused" not in err  # a library prints nothing unless asked


if __name__ == "__main__":
    ring.group()
    print(json.dumps([run(make_model()) for make_model in OBSTACLES]))
