"""The loss of a patched model is made without its logits, and is mlx-lm's loss whatever the model does."""

import math
import re
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
import pytest
from mlx.utils import tree_flatten
from mlx_lm.tuner.lora import LoRALinear
from mlx_lm.tuner.trainer import TrainingArgs, default_loss, evaluate, train
from mlx_lm.tuner.utils import linear_to_lora_layers

import mlx_fused
import tiny_models
from graph import primitives
from mlx_fused import _ext
from mlx_fused.losses import calls, cross_entropy_loss, token_losses
from zoo import configs

OURS = "FusedLinearCrossEntropy"
LENGTHS = mx.array([[0, 9], [3, 6], [1, 1]])  # all of the first row, some of the second, one of the third
COMPILED = mx.compile(lambda cap, x: mx.tanh(x / cap) * cap, shapeless=True)


class Head(nn.Module):
    """As little of a model as has logits: tokens, a head, and what is done with its output."""

    def __init__(self, after=lambda logits: logits, bias=False, words=40):
        super().__init__()
        self.embed_tokens = nn.Embedding(words, 32)
        self.lm_head = nn.Linear(32, words, bias=bias)
        self.after = after
        mx.eval(self.parameters())

    def __call__(self, inputs):
        return self.after(self.lm_head(self.embed_tokens(inputs)))


def batch(words=40):
    return mx.random.randint(0, words, (3, 10), key=mx.random.key(3))


def gradients(loss, model, tokens):
    (value, count), grads = nn.value_and_grad(model, loss)(model, tokens, LENGTHS)
    return value, count, grads


def compiled(loss, model, tokens):
    state = [model.state]
    step = partial(mx.compile, inputs=state, outputs=state)
    return step(lambda tokens: gradients(loss, model, tokens))(tokens)


def evaluated(loss, model, tokens):
    return *loss(model, tokens, LENGTHS), {}


def assert_alike(actual, expected, tolerance=1e-5):
    (loss, count, grads), (of_loss, of_count, of_grads) = actual, expected
    assert (loss.dtype, loss.shape, count.dtype) == (mx.float32, (), of_count.dtype)
    assert count.item() == of_count.item()
    np.testing.assert_allclose(loss.item(), of_loss.item(), rtol=tolerance)
    grads, of_grads = tree_flatten(grads), tree_flatten(of_grads)
    largest = max((mx.abs(grad).max().item() for _, grad in of_grads), default=0)
    for (name, grad), (_, of_grad) in zip(grads, of_grads, strict=True):
        assert grad.dtype == of_grad.dtype, name
        grad, of_grad = (np.array(g.astype(mx.float32)) for g in (grad, of_grad))
        np.testing.assert_allclose(grad, of_grad, rtol=0, atol=tolerance * largest, err_msg=name)


def check(model, is_ours, run=gradients, tolerance=1e-5):
    """Our loss and its gradients are mlx-lm's; and made without logits, or not."""
    tokens = batch()
    expected = run(default_loss, model, tokens)
    mx.eval(expected)
    with mlx_fused.patched(model) as report:
        actual = run(cross_entropy_loss, model, tokens)
        if run is not compiled:
            assert (OURS in primitives(actual[0])) == is_ours, report
        assert_alike(actual, expected, tolerance)
        counter = calls(model)
        assert (counter.total, counter.fused) == (1, is_ours)
    return counter.reason


@pytest.mark.parametrize("run", [evaluated, gradients, compiled])
@pytest.mark.parametrize(
    "model", ["llama", "gemma2", "gemma3", "gemma4_text", "cohere", "granite", "minicpm", "nanochat"]
)
def test_models_are_trained_without_logits(model, run):
    check(configs.make(model), True, run, 1e-4)


def _quantized(model, *form, **mode):
    model.lm_head = model.lm_head.to_quantized(*form, **mode)
    return model


HEADS = {
    "dense": lambda model: model,
    "bias": lambda model: Head(bias=True),
    "4-bit": lambda model: _quantized(model, 32, 4),
    "mxfp8": lambda model: _quantized(model, 32, 8, mode="mxfp8"),
    "frozen": lambda model: model.lm_head.freeze() and model,
    "softcap": lambda model: Head(lambda y: 5 * mx.tanh(y / 5)),
}


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16], ids=str)
@pytest.mark.parametrize("head", HEADS)
def test_every_kind_of_head(head, dtype):
    model = Head()
    model.set_dtype(dtype)
    model = HEADS[head](model)
    model.set_dtype(dtype)
    if head in ("4-bit", "mxfp8"):
        model.freeze()
        model.lm_head = LoRALinear.from_base(model.lm_head, r=4)
        model.lm_head.lora_b = mx.random.normal((4, 40)) * 0.1
    # MLX's losses of bfloat16 logits are bfloat16.
    check(model, True, tolerance=1e-5 if dtype == mx.float32 else 4e-2)


DOUBLED = {
    "times": lambda y: y * 2,
    "times, turned": lambda y: 0.3 * y,
    "over": lambda y: y / 4,
    "negative": lambda y: -0.5 * y,
    "softcap": lambda y: mx.tanh(y / 3) * 3,
    "another softcap": lambda y: 5 * mx.tanh(0.5 * y),
    "a negative softcap": lambda y: -5 * mx.tanh(y / 2),
    "scale and softcap": lambda y: 2 * (mx.tanh(y * 0.5 / 3) * 3),
    "compiled": partial(COMPILED, 2.0),
    "compiled, of an array": lambda y: COMPILED(mx.array(2.0), y),
    "compiled, then more": lambda y: COMPILED(2.0, y / 3) * 2,
    "in float32": lambda y: y.astype(mx.float32) * mx.array([2.0]),
    "reshaped": lambda y: y.reshape(-1, 40).reshape(3, 3, 3, 40).flatten(0, 1).reshape(3, 9, 40),
}


@pytest.mark.parametrize("run", [evaluated, gradients, compiled])
@pytest.mark.parametrize("after", DOUBLED)
def test_what_is_done_with_the_logits(after, run):
    check(Head(DOUBLED[after]), True, run)


def test_the_scale_and_softcap_are_read():
    x, w = mx.random.normal((4, 32)), mx.random.normal((40, 32))
    for after, expected in (
        (lambda y: y, (1.0, None)),
        (lambda y: y * 3 / 2, (1.5, None)),
        (lambda y: 5 * mx.tanh(0.5 * y), (2.5, 5.0)),
        (lambda y: -5 * mx.tanh(y / 2), (-2.5, 5.0)),
        (partial(COMPILED, 2.0), (1.0, 2.0)),
    ):
        found, (weight, *others), *numbers = _ext.head_of(after(x @ w.T))
        assert tuple(numbers) == expected
        assert mx.array_equal(found, x) and mx.array_equal(weight, w) and others[0] is None


def test_one_compiled_function_twice():
    part = mx.compile(lambda y: y * 2.0 / 3.0)
    *_, scale, softcap = _ext.head_of(part(part(mx.ones((4, 32)) @ mx.ones((40, 32)).T)))
    assert math.isclose(scale, (2 / 3) ** 2, rel_tol=1e-6) and softcap is None


@pytest.mark.parametrize(
    "after",
    [
        lambda x, w: (x @ w.T) * mx.array(2.7).astype(mx.int32),
        lambda x, w: (x @ w.T) * mx.array(2.7).astype(mx.bool_),
        lambda x, w: (x @ w.T) * mx.array(0.1).astype(mx.bfloat16),
        lambda x, w: x @ mx.transpose(w, (0, 1)),
        lambda x, w: mx.addmm(mx.array([1.0]), x, w.T),
    ],
    ids=["to integers", "to bytes", "to 16 bits", "no transpose", "one bias"],
)
def test_what_only_looks_like_a_head(after):
    assert isinstance(_ext.head_of(after(mx.ones((4, 40)), mx.ones((40, 40)))), str)


def _changed(y):
    y[..., 3] = 0
    return y


def _evaluated(y):
    mx.eval(y)
    return y


OTHERWISE = {
    "more is added": lambda y: y + 1,
    "by an array": lambda y: y * mx.arange(1, 41),
    "by logits": lambda y: y * y,
    "a number over them": lambda y: 2 / (y + 9),
    "infinitely": lambda y: y * float("inf"),
    "two softcaps": lambda y: mx.tanh(mx.tanh(y)),
    "no softcap": lambda y: mx.sigmoid(y),
    "compiled otherwise": mx.compile(lambda y: mx.sin(y) * 2),
    "turned": lambda y: y[..., ::-1],
    "fewer words": lambda y: y[..., :38],
    "changed": _changed,
    "no gradient": lambda y: mx.stop_gradient(y) + 0 * y,
    "probabilities": lambda y: nn.log_softmax(y),
    "rounded": lambda y: y.astype(mx.bfloat16),
    "other rows": lambda y: y[::-1],
    "several": lambda y: mx.concatenate([y[..., :20], y[..., 20:]], -1),
}


@pytest.mark.parametrize("after", OTHERWISE)
def test_anything_else_is_mlx_own_loss(after):
    words = 38 if after == "fewer words" else 40
    model, tokens = Head(OTHERWISE[after]), batch(words)
    run = evaluated if after == "infinitely" else gradients
    expected = run(default_loss, model, tokens)
    with mlx_fused.patched(model):
        actual = run(cross_entropy_loss, model, tokens)
        counter = calls(model)
    assert OURS not in primitives(actual[0])
    assert (counter.total, counter.fused) == (1, 0) and counter.reason
    if after == "infinitely":
        assert math.isnan(actual[0].item()) and math.isnan(expected[0].item())
    else:
        assert_alike(actual, expected, 1e-4 if after != "rounded" else 4e-2)


def test_logits_that_were_evaluated_are_taken_as_they_are():
    assert "evaluated" in check(Head(_evaluated), False, evaluated)


def test_a_trained_scale_keeps_its_gradient():
    class Scaled(Head):
        def __init__(self):
            super().__init__(lambda y: y * self.gain)
            self.gain = mx.array([1.5])

    assert "multiplied with an array" in check(Scaled(), False)
    model = Scaled()
    model.freeze(keys="gain")
    check(model, False)  # of MLX's transformations it is an argument still
    check(model, True, evaluated)


def test_other_losses_get_plain_logits():
    def loss(model, tokens, lengths):  # as one writes it: of the same model, in the same way
        logits = model(tokens[:, :-1])
        ce = nn.losses.cross_entropy(logits, tokens[:, 1:])
        return ce.mean() + 1e-3 * (logits**2).mean(), mx.array(1)

    model, tokens = tiny_models.make("gemma2"), batch(96)
    expected = gradients(loss, model, tokens)
    mlx_fused.patch(model)
    assert type(model(tokens)) is mx.array
    actual = gradients(loss, model, tokens)
    assert OURS not in primitives(actual[0])
    assert_alike(actual, expected, 1e-4)


@pytest.mark.parametrize("how", ["unpatched", "exact", "off"])
def test_a_model_that_is_not_to_be_changed_is_not(how, monkeypatch):
    model, tokens = tiny_models.make("llama"), batch(96)
    expected = default_loss(model, tokens, LENGTHS)
    if how != "unpatched":
        mlx_fused.patch(model, exact=how == "exact")
    if how == "off":
        monkeypatch.setenv("MLX_FUSED", "0")
    loss, count = cross_entropy_loss(model, tokens, LENGTHS)
    assert OURS not in primitives(loss)
    np.testing.assert_allclose(loss.item(), expected[0].item(), rtol=1e-6)
    assert count.item() == expected[1].item()


def test_an_unpatched_model_has_no_calls():
    assert calls(Head()).total == 0
    with pytest.raises(TypeError, match=r"^model must be an mlx\.nn\.Module but got function\.$"):
        calls(lambda tokens: tokens)
    model, tokens = Head(), batch()
    loss, _ = cross_entropy_loss(lambda inputs: model(inputs), tokens, LENGTHS)
    assert loss.item() == default_loss(model, tokens, LENGTHS)[0].item()


def test_no_target_that_counts():
    model = Head()
    mlx_fused.patch(model)
    loss, count = cross_entropy_loss(model, batch(), mx.array([[9, 8]] * 3))
    assert OURS in primitives(loss) and math.isnan(loss.item()) and count.item() == 0


@pytest.mark.parametrize("shape", [(1, 2), (3,), (3, 3)])
@pytest.mark.parametrize("patch", [False, True])
def test_lengths_of_another_shape(shape, patch):
    model = Head()
    if patch:
        mlx_fused.patch(model)
    with pytest.raises(ValueError, match=re.escape(f"lengths must have shape (3, 2) but got {shape}.")):
        cross_entropy_loss(model, batch(), mx.ones(shape, mx.int32))


def test_vmap_over_batches():
    model, batches = Head(), mx.stack([batch(), batch()[::-1], batch() // 2])
    lengths = mx.stack([LENGTHS, LENGTHS[::-1], LENGTHS])
    expected = [default_loss(model, *pair) for pair in zip(batches, lengths, strict=True)]
    mlx_fused.patch(model)
    losses, counts = mx.vmap(lambda *pair: cross_entropy_loss(model, *pair))(batches, lengths)
    np.testing.assert_allclose(losses.tolist(), [loss.item() for loss, _ in expected], rtol=1e-5)
    assert counts.tolist() == [count.item() for _, count in expected]


# What MLX makes of heads that are not ours, on a GPU for example.


def _given(x, layer):
    return _ext.head_of(layer(x))


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", [(5, 32), (2, 3, 32), (2, 1, 3, 32)], ids=str)
def test_products_of_mlx_are_heads(shape, bias):
    layer, x = nn.Linear(32, 40, bias=bias), mx.random.normal(shape)
    found, (weight, of_bias, *others), scale, softcap = _given(x, layer)
    assert mx.array_equal(weight, layer.weight) and (scale, softcap) == (1.0, None)
    assert (of_bias is not None) == bias and others[:2] == [None, None]
    assert mx.array_equal(found.flatten(), x.flatten())
    if bias:
        assert mx.array_equal(of_bias, layer.bias)


@pytest.mark.parametrize("form", [(64, 4, "affine"), (32, 8, "affine"), (32, 4, "mxfp4"), (16, 4, "nvfp4")])
def test_quantized_products_of_mlx_are_heads(form):
    group_size, bits, mode = form
    layer = nn.QuantizedLinear(64, 40, False, group_size, bits, mode)
    x = mx.random.normal((2, 3, 64))
    found, operands, *_ = _given(x, layer)
    operands = mlx_fused.LinearOperands(*operands)
    assert mx.array_equal(operands.weight, layer.weight) and mx.array_equal(operands.scales, layer.scales)
    assert (operands.group_size, operands.bits, operands.mode) == form
    assert mx.array_equal(found, x)
    np.testing.assert_allclose(mlx_fused.fused_linear(x, operands), layer(x), rtol=1e-4, atol=1e-4)


def test_products_with_columns_are_none():
    x = mx.random.normal((4, 32))
    for y in (x @ mx.random.normal((32, 40)), mx.addmm(mx.zeros((4, 40)), x, mx.zeros((40, 32)).T)):
        assert "rows of a weight" in _ext.head_of(y)
    w = mx.random.normal((40, 32))
    assert "rows of a weight" in _ext.head_of(mx.addmm(mx.zeros(40), x, w.T, alpha=2.0))
    codes = mx.quantize(mx.random.normal((32, 64)), 32, 4)
    y = mx.quantized_matmul(x, *codes, transpose=False, group_size=32, bits=4)
    assert "rows of a weight" in _ext.head_of(y)


# Memory.


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="no limit of what a process may allocate")
def test_a_step_runs_where_logits_do_not_fit():
    def ends(who):
        script = Path(__file__).with_name("limited_memory.py")
        return subprocess.run([sys.executable, script, who, "1024"], capture_output=True, text=True)

    ours = ends("ours")
    assert ours.returncode == 0 and "loss" in ours.stdout, ours.stderr
    # MLX does not look whether it got the memory.
    for who in ("stock", "loss"):
        failed = ends(who)
        assert failed.returncode in (-signal.SIGSEGV, -signal.SIGABRT) and "loss" not in failed.stdout


# mlx-lm's trainer.


def trained(loss, patch, **options):
    mx.random.seed(0)
    model = tiny_models.make("gemma2")
    model.freeze()
    linear_to_lora_layers(model, 2, {"rank": 4, "scale": 2.0, "dropout": 0.0})
    if patch:
        mlx_fused.patch(model)
    rng = np.random.default_rng(0)
    texts = [(rng.integers(0, 96, 12).tolist(), offset) for offset in (0, 3, 5, 1, 0, 2, 7, 4)]
    losses = []

    class Reports:
        def on_train_loss_report(self, info):
            losses.append(info["train_loss"])

        def on_val_loss_report(self, info):
            losses.append(info["val_loss"])

    np.random.seed(0)
    args = TrainingArgs(
        batch_size=2, iters=4, steps_per_report=1, adapter_file=options.pop("file"), **options
    )
    train(model, optim.Adam(1e-2), texts, texts[:4], args, loss, training_callback=Reports())
    losses.append(evaluate(model, texts, 2, -1, loss=loss))
    return losses, dict(tree_flatten(model.trainable_parameters())), calls(model) if patch else None


def assert_trained_alike(actual, expected):
    (losses, parameters, counter), (of_losses, of_parameters, _) = actual, expected
    assert len(of_losses) == 7  # of four steps, two validations and the end
    np.testing.assert_allclose(losses, of_losses, rtol=1e-4)
    for name, parameter in of_parameters.items():
        np.testing.assert_allclose(parameters[name], parameter, rtol=0, atol=2e-3, err_msg=name)
    assert counter.total == counter.fused > 0


@pytest.mark.parametrize("options", [{}, {"grad_checkpoint": True}, {"grad_accumulation_steps": 2}], ids=str)
def test_mlx_lm_trains_through_it(options, tmp_path, monkeypatch):
    from mlx_lm.models import gemma2

    call = gemma2.TransformerBlock.__call__
    file = tmp_path / "adapters.safetensors"
    stock = trained(default_loss, False, file=file, **options)
    monkeypatch.setattr(gemma2.TransformerBlock, "__call__", call)  # which grad_checkpoint replaces
    ours = trained(cross_entropy_loss, True, file=file, **options)
    monkeypatch.setattr(gemma2.TransformerBlock, "__call__", call)
    assert_trained_alike(ours, stock)


@pytest.mark.parametrize("patched", [False, True], ids=["stock", "patched"])
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("masked", [False, True])
def test_the_loss_of_every_token(masked, smoothing, patched):
    model, tokens = Head(), batch()
    inputs, targets = tokens[:, :-1], tokens[:, 1:]
    mask = targets % 3 > 0 if masked else None
    if patched:
        mlx_fused.patch(model)

    def ours(model):
        losses = token_losses(model, inputs, targets, mask=mask, label_smoothing=smoothing)
        assert (losses.shape, losses.dtype) == (targets.shape, mx.float32)
        return (losses**2).sum(), losses

    def stock(model):
        losses = nn.losses.cross_entropy(model(inputs), targets, label_smoothing=smoothing)
        losses = losses if mask is None else losses * mask
        return (losses**2).sum(), losses

    results = [tree_flatten(nn.value_and_grad(model, loss)(model)) for loss in (ours, stock)]
    for (_, a), (_, b) in zip(*results, strict=True):
        assert float(mx.abs(a - b).max()) < 2.0**-18 * float(mx.abs(b).max())
    assert (calls(model).total, calls(model).fused) == ((1, 1) if patched else (0, 0))


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"targets": mx.zeros((3, 8), mx.int32)}, r"targets must have shape \(3, 9\) but got \(3, 8\)"),
        ({"mask": mx.ones((9,), mx.bool_)}, r"mask must have shape \(3, 9\) but got \(9,\)"),
        ({"mask": mx.ones((3, 9))}, "mask must be bool but got mlx.core.float32"),
    ],
)
def test_what_is_wrong_with_tokens(changes, message):
    given = {"targets": mx.zeros((3, 9), mx.int32), "mask": None} | changes
    model = Head()
    for patch in (lambda model: None, mlx_fused.patch):
        patch(model)
        with pytest.raises(ValueError, match=rf"\[token_losses\] {message}"):
            token_losses(model, batch()[:, :-1], **given)
