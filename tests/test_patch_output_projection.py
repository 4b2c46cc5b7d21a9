"""The output projection and the residual as one operation: what the projection is, and the options."""

import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx_lm.tuner.dora import DoRALinear
from mlx_lm.tuner.lora import LoRALinear

import mlx_fused
from adding_layers import Direct, Mixer, Named, nodes, residual
from tiny_models import assert_same, integers, sample


def with_o(layer):
    model = Direct()
    model.attn.o_proj = layer
    return model


def lora(base, dropout=0.0, scale=2.0):
    layer = LoRALinear.from_base(base, r=4, dropout=dropout, scale=scale)
    layer.lora_b = integers((4, 64))
    layer.lora_a = integers((64, 4))
    return layer


LINEAR = {
    "dense": lambda: nn.Linear(64, 64, bias=False),
    "bias": lambda: nn.Linear(64, 64),
    "affine": lambda: nn.QuantizedLinear(64, 64, bias=True, group_size=32, bits=4),
    "mxfp8": lambda: nn.QuantizedLinear(64, 64, bias=False, mode="mxfp8"),
    "lora": lambda: lora(nn.Linear(64, 64)),
    "qlora": lambda: lora(nn.QuantizedLinear(64, 64, bias=False)),
    "nvfp4 lora": lambda: lora(nn.QuantizedLinear(64, 64, bias=False, mode="nvfp4")),
}


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("make", LINEAR.values(), ids=LINEAR)
def test_every_kind_of_projection(make, exact):
    model, x = with_o(make()), sample(2, 3, 64)
    model.freeze()

    def results():
        return model(x), mx.grad(lambda x: (model(x) * x).sum())(x)

    expected = results()
    part = residual(model, exact=exact)
    assert part.fused
    for a, e in zip(results(), expected, strict=True):
        # float32 sums of 64 products and of 4, of which the largest decides.
        assert mx.abs(a - e).max() <= 8 * 64**0.5 * 2**-24 * 64 * mx.abs(e).max()
    assert part.calls.fused == part.calls.total == 2


OBSTACLES = [
    (lambda: DoRALinear.from_base(nn.Linear(64, 64)), "o_proj is DoRALinear"),
    (lambda: lora(nn.Linear(64, 64), dropout=0.5), "o_proj has dropout"),
    (lambda: with_dropout(abs), "o_proj has a dropout of type builtin_function_or_method"),
    (
        lambda: lora(nn.Linear(64, 64), scale=mx.array(2.0)),
        "o_proj has a scale of type array",
    ),
    (lambda: nn.layers.distributed.ShardedToAllLinear(64, 64), "o_proj is ShardedToAllLinear"),
    (lambda: nn.layers.distributed.AllToShardedLinear(64, 64), "o_proj is AllToShardedLinear"),
    (
        lambda: lora(nn.layers.distributed.AllToShardedLinear(64, 64)),
        "o_proj is LoRALinear of AllToShardedLinear",
    ),
    (lambda: nn.Sequential(nn.Linear(64, 64)), "o_proj is Sequential"),
]


@pytest.mark.parametrize("make, obstacle", OBSTACLES, ids=[reason for _, reason in OBSTACLES])
def test_projections_that_stay_as_they_are(make, obstacle):
    model, x = with_o(make()), sample(2, 3, 64)

    def run():
        mx.random.seed(4)  # of the dropout
        return model(x)

    expected = run()
    part = residual(model)
    assert part.obstacle == obstacle
    assert_same([run()], [expected])
    assert part.calls.fused == 0 and part.calls.total == 1


def with_dropout(dropout):
    layer = lora(nn.Linear(64, 64))
    layer.dropout = dropout
    return layer


@pytest.mark.parametrize(
    "make", [lambda: lora(nn.Linear(64, 64), dropout=0.5), lambda: with_dropout(nn.Identity())]
)
def test_dropout_that_is_not_active(make):
    model, x = with_o(make()), sample(2, 3, 64)
    part = residual(model)
    model.eval()
    model(x)
    assert part.calls.fused == 1


def test_insisting_on_our_kernels(monkeypatch):
    monkeypatch.setenv("MLX_FUSED_ROUTE", "composed")
    model, x = Named(), sample(1, 3, 64)
    for o_residual, count in (("auto", 0), (True, 1)):
        part = residual(model, o_residual=o_residual)
        assert nodes(model(x)) == count
    assert part.calls.share == "2 of 2 calls, 1 of these by MLX's own operations"


def test_options():
    model, x = with_o(lora(Mixer().o_proj)), sample(1, 3, 64)
    expected = model(x)
    for options, obstacle in (
        ({"o_residual": False}, "o_residual=False"),
        ({"lora": False}, "lora=False"),
        ({"o_residual": True}, None),
    ):
        assert residual(model, **options).obstacle == obstacle
        assert_same([model(x)], [expected])
    for wrong in ("always", 0, 1, None):
        with pytest.raises(ValueError, match=f"o_residual must be 'auto', True or False but got {wrong!r}"):
            mlx_fused.patch(model, o_residual=wrong)
