"""The loss in several processes: each has a part of the batch, or a part of the model."""

import sys
import tempfile
from functools import partial
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.nn.layers.distributed import shard_linear
from mlx_lm.tuner.trainer import default_loss

import cross_entropy
import mlx_fused
import ring
from graph import primitives
from mlx_fused.losses import calls, cross_entropy_loss
from operands import normal
from ring import RANKS
from test_losses import OURS, Head, assert_trained_alike, trained
from test_models import assert_close
from tiny_models import make, tokens

# Each process has a row of all and one of some, as mlx-lm's trainer deals them out.
LENGTHS = mx.array([[1, 9], [1, 9], [3, 6], [3, 6]])


def of_rank(group, *arrays):
    return [a[group.rank() :: RANKS] for a in arrays]


def operation_on_parts_of_the_rows(group):
    """The averaged gradients are the formula's of all rows."""
    for options in ({"masked": "mask"}, {"form": ("affine", 32, 4), "rank": 3}):
        rng = np.random.default_rng(0)
        whole = cross_entropy.make(rng, (RANKS, 9), 64, 40, **options)
        cotangent = normal(rng, whole.targets.shape)
        given = whole.head.x, whole.targets, whole.mask, cotangent
        x, targets, mask, own = (None if a is None else a[group.rank() :][:1] for a in given)
        part = cross_entropy.Loss(whole.head.replace(x=x), targets, mask)
        (of_x, *others), keys = part.gradients(own), whole.head.trainable
        grads = [mx.distributed.all_gather(of_x), *(RANKS * g for g in nn.average_gradients(others))]
        whole.check(mx.distributed.all_gather(part()), cotangent, keys, grads)


def gradients(loss, model, batch, lengths):
    """As mlx-lm's training step makes them."""
    (value, _), grads = nn.value_and_grad(model, loss)(model, batch, lengths)
    return mx.distributed.all_sum(value) / RANKS, nn.average_gradients(grads)


def compiled(loss, model, batch, lengths):
    step = mx.compile(partial(gradients, loss, model), inputs=model.state, outputs=model.state)
    return step(batch, lengths)


def parts_of_the_batch(group):
    model, batch = make("llama"), tokens(2 * RANKS, 10)
    (value, _), grads = nn.value_and_grad(model, default_loss)(model, batch, LENGTHS)
    for run in (gradients, compiled):
        stock = run(default_loss, model, *of_rank(group, batch, LENGTHS))
        assert_close(stock, [value, grads], mx.float32)
        with mlx_fused.patched(model):
            ours = run(cross_entropy_loss, model, *of_rank(group, batch, LENGTHS))
            assert (calls(model).total, calls(model).fused) == (1, 1)
            assert_close(ours, stock, mx.float32)
            assert_close(ours, [value, grads], mx.float32)


def trainer_of_mlx_lm(group):
    with tempfile.TemporaryDirectory() as folder:
        stock, ours = (
            trained(loss, loss is cross_entropy_loss, file=Path(folder, "adapters.safetensors"))
            for loss in (default_loss, cross_entropy_loss)
        )
    assert_trained_alike(ours, stock)


def parts_of_the_model(group):
    for tied in (True, False):
        model, batch = make("llama", tie_word_embeddings=tied), tokens(len(LENGTHS), 10)
        alone, _ = default_loss(model, batch, LENGTHS)
        mx.eval(alone)
        model.shard(group)
        check_sharded(model, batch, True)
        with mlx_fused.patched(model):
            assert_close([cross_entropy_loss(model, batch, LENGTHS)[0]], [alone], mx.float32)


class SummedHead(Head):
    """Each process has some of the features."""

    def __init__(self, group):
        super().__init__()
        self.lm_head, self.rank = shard_linear(self.lm_head, "sharded-to-all", group=group), group.rank()

    def __call__(self, inputs):
        return self.lm_head(mx.split(self.embed_tokens(inputs), RANKS, -1)[self.rank])


class GatheredHead(Head):
    """Each process has some of the words."""

    def __init__(self, group):
        super().__init__(lambda y: mx.distributed.all_gather(y.T, group=group).T)
        self.lm_head = shard_linear(self.lm_head, "all-to-sharded", group=group)


def parts_of_the_head(group):
    for kind in (SummedHead, GatheredHead):
        mx.random.seed(0)  # the same head in every process
        check_sharded(kind(group), tokens(len(LENGTHS), 10) % 40, False)


def check_sharded(model, batch, is_ours):
    def run(loss):
        (value, _), grads = nn.value_and_grad(model, loss)(model, batch, LENGTHS)
        return value, grads

    stock = run(default_loss)
    mx.eval(stock)
    with mlx_fused.patched(model):
        ours = run(cross_entropy_loss)
        assert (OURS in primitives(ours[0])) == is_ours
        assert_close(ours, stock, mx.float32)


CHECKS = [
    operation_on_parts_of_the_rows,
    parts_of_the_batch,
    trainer_of_mlx_lm,
    parts_of_the_model,
    parts_of_the_head,
]


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_in_two_processes(check, tmp_path):
    ring.run(tmp_path, __file__, check.__name__)


if __name__ == "__main__":
    globals()[sys.argv[1]](ring.group())
