"""One call of a patched attention module: what is fused, for whom, and what is not."""

import gc
import threading
from collections import Counter

import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx_lm.tuner.dora import DoRALinear
from mlx_lm.tuner.lora import LoRALinear

import mlx_fused
from tiny_models import LAYERS, PROJECTIONS, Attention, assert_same, calls, fused, make, sample, tokens


@pytest.mark.parametrize("shape", [(2, 5, 64), (1, 1, 64), (3, 64), (64,), (2, 3, 4, 64), (2, 0, 64)])
@pytest.mark.parametrize("bias", [False, True])
def test_any_shape_that_linear_takes(shape, bias):
    attention, x = Attention(bias=bias), sample(*shape)
    expected = attention(x)
    mlx_fused.patch(attention)
    actual = attention(x)
    assert calls(actual) == (1, 0)
    assert [a.shape for a in actual] == [e.shape for e in expected]
    assert_same(actual, expected)


def test_mixed_types_promote_as_linear_does():
    attention, x = Attention(), sample(1, 3, 64)
    attention.set_dtype(mx.bfloat16)
    expected = attention(x)
    mlx_fused.patch(attention)
    actual = attention(x)
    assert [a.dtype for a in actual] == [e.dtype for e in expected] == [mx.float32] * 3
    assert_same(actual, expected)


def test_a_wrong_input_is_refused():
    attention = Attention()
    mlx_fused.patch(attention)
    with pytest.raises(ValueError, match="fused_qkv_projection"):
        attention(sample(1, 2, 128))  # as many numbers as four tokens of the right size
    assert calls(attention(sample(1, 2, 64))) == (1, 0)


def test_no_copies():
    attention, x = Attention(1024, 1024, 256), sample(2, 256, 1024)
    mlx_fused.patch(attention)
    mx.eval(x, attention.parameters())
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    outputs = attention(x)
    heads = [y.reshape(2, 256, -1, 64).transpose(0, 2, 1, 3) for y in outputs]
    mx.eval(heads)
    needed = sum(y.nbytes for y in outputs)
    assert mx.get_peak_memory() - before <= 1.02 * needed


class Twice(Attention):
    def __call__(self, x):
        return self.q_proj(x), self.k_proj(x), self.v_proj(x), self.q_proj(x)


class Loop(Attention):
    def __call__(self, x):
        return (*super().__call__(x), *super().__call__(x + 1))


class Cross(Attention):
    def __call__(self, x):
        y = 2 * x
        return self.q_proj(x), self.k_proj(y), self.v_proj(y)


class Reads(Attention):
    def __call__(self, x):
        return super().__call__(x.astype(self.q_proj.weight.dtype))


class Backwards(Attention):
    def __call__(self, x):
        return self.v_proj(x), self.k_proj(x), self.q_proj(x)


@pytest.mark.parametrize(
    "cls, counts",
    # Nothing handed out is kept, so that a projection asked for again is made again, by itself.
    [(Twice, (1, 1)), (Loop, (2, 0)), (Cross, (2, 0)), (Reads, (1, 0)), (Backwards, (1, 0))],
)
def test_however_the_projections_are_called(cls, counts):
    attention, x = cls(), sample(2, 3, 64)
    expected = attention(x)
    mlx_fused.patch(attention)
    actual = attention(x)
    assert calls(actual) == counts
    assert_same(actual, expected)


def test_outside_its_call_a_projection_is_itself():
    attention, x = Attention(), sample(1, 3, 64)
    mlx_fused.patch(attention)
    assert attention.q_proj is attention["q_proj"]
    assert calls([attention.q_proj(x)]) == (0, 1)


class InPlace(Attention):
    def __call__(self, x):
        queries = self.q_proj(x)
        x += 1
        return queries, self.k_proj(x), self.v_proj(x)


def test_an_input_that_is_changed_in_place_is_another():
    attention = InPlace()
    expected = attention(sample(2, 3, 64))
    mlx_fused.patch(attention)
    assert_same(attention(sample(2, 3, 64)), expected)


class Nested(Attention):
    """Calls another attention module, and itself, between its own projections."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def __call__(self, x, depth=1):
        q = self.q_proj(x)
        within = [*self.inner(x), self.inner.k_proj(x), *(self(x, 0) if depth else ())]
        return q, *within, self.k_proj(x), self.v_proj(x)


def test_calls_within_calls():
    attention, x = Nested(Attention()), sample(1, 3, 64)
    expected = attention(x)
    mlx_fused.patch(attention)
    actual = attention(x)
    assert calls(actual) == (4, 2)  # the inner module's lone projection is a plain product
    assert_same(actual, expected)


class Fails(Attention):
    def __call__(self, x):
        self.q_proj(x)
        raise RuntimeError("no keys today")


def test_an_error_ends_the_call():
    attention, x = Fails(), sample(1, 3, 64)
    mlx_fused.patch(attention)
    with pytest.raises(RuntimeError, match="no keys today"):
        attention(x)
    assert attention.q_proj is attention["q_proj"]
    assert calls([attention.q_proj(x), attention.k_proj(x)]) == (0, 2)


def test_threads():
    model = make("llama")
    mlx_fused.patch(model)
    mx.eval(expected := [model(tokens(1, n + 2)) for n in range(4)])
    results, start = Counter(), threading.Barrier(4)

    def work(n):
        stream = mx.new_stream(mx.cpu)
        start.wait()
        with mx.stream(stream):
            for _ in range(10):
                logits = model(tokens(1, n + 2))
                layers, _ = fused(logits)
                results[n] += mx.array_equal(logits, expected[n]).item() and layers == LAYERS

    threads = [threading.Thread(target=work, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == {n: 10 for n in range(4)}


def test_a_call_leaves_nothing_to_the_garbage_collector():
    model = make("llama")
    mlx_fused.patch(model)
    mx.eval(model(tokens(1, 4)))
    gc.collect()
    gc.disable()
    try:
        mx.eval(model(tokens(1, 4)))
        assert gc.collect() == 0  # arrays in cycles would take memory until it runs
    finally:
        gc.enable()


class Pauses(Attention):
    """Runs ``pause`` between its projections."""

    def __call__(self, x, pause=lambda: None):
        q = self.q_proj(x)
        pause()
        return q, self.k_proj(x), self.v_proj(x)


def test_calls_of_two_threads_do_not_meet():
    attention, x, y = Pauses(), sample(1, 3, 64), sample(1, 5, 64)
    expected = attention(x)
    mlx_fused.patch(attention)
    other_is_inside, this_is_done = threading.Event(), threading.Event()
    others = []

    def pause_of_other():
        other_is_inside.set()
        this_is_done.wait(60)

    other = threading.Thread(target=lambda: others.append(calls(attention(y, pause_of_other))))

    def pause_of_this():
        other.start()
        assert other_is_inside.wait(60)

    actual = attention(x, pause_of_this)
    this_is_done.set()
    other.join()
    assert calls(actual) == (1, 0) and others == [(1, 0)]
    assert_same(actual, expected)


class OtherNames(nn.Module):
    """As nanochat's."""

    def __init__(self):
        super().__init__()
        for name, linear in zip(("c_q", "c_k", "c_v"), Attention().children().values(), strict=True):
            self[name] = linear

    def __call__(self, x):
        return self.c_q(x), self.c_k(x), self.c_v(x)


class OtherMethod(nn.Module):
    """As iquestloopcoder's, whose model calls parts of it."""

    def __init__(self):
        super().__init__()
        dict.update(self, Attention())

    get_qkv = Attention.__call__


def test_other_names():
    attention, x = OtherNames(), sample(1, 3, 64)
    expected = attention(x)
    mlx_fused.patch(attention)
    assert calls(attention(x)) == (1, 0)
    assert_same(attention(x), expected)


def test_another_method():
    attention, x = OtherMethod(), sample(1, 3, 64)
    expected = attention.get_qkv(x)
    mlx_fused.patch(attention)
    assert calls(attention.get_qkv(x)) == (1, 0)
    assert_same(attention.get_qkv(x), expected)


class Packed(nn.Module):
    def __init__(self, name):
        super().__init__()
        self[name] = nn.Linear(64, 64)
        self.o_proj = nn.Linear(64, 64)

    def __call__(self, x):
        return self.o_proj(x)


@pytest.mark.parametrize(
    "name, obstacle",
    [
        ("qkv_proj", "they are one projection already: qkv_proj"),
        ("kv_a_proj_with_mqa", "they are made from latents: kv_a_proj_with_mqa"),
        ("q_proj", "it does not project to all three"),
    ],
)
def test_modules_with_an_output_projection_alone(name, obstacle):
    attention, x = Packed(name), sample(1, 3, 64)
    expected = attention(x)
    (layer,) = mlx_fused.patch(attention, linear=False).layers
    assert layer.qkv.obstacle == obstacle
    assert_same([attention(x)], [expected])


# What cannot be fused


class Shared(Attention):
    """As gemma3n's later layers, which take keys and values from an earlier one."""

    def __init__(self):
        super().__init__()
        self.is_kv_shared_layer = True


class Uncallable(nn.Module):
    """As iquestloopcoder's attention, which the layer calls method by method."""

    def __init__(self):
        super().__init__()
        self.q_proj = self.k_proj = self.v_proj = nn.Linear(64, 64)


class OtherLinear(nn.Linear):
    pass


def with_q(layer):
    attention = Attention()
    attention.q_proj = layer
    return attention


def in_dtype(dtype, names):
    attention = Attention()
    for name in names:
        attention[name].set_dtype(dtype)
    return attention


def with_a_bias_in_float16():
    attention = Attention(bias=True)
    attention.q_proj.bias = attention.q_proj.bias.astype(mx.float16)
    return attention


UNFUSED = [
    (lambda: Shared(), "it takes keys and values from another layer"),
    (
        lambda: with_q(nn.QuantizedLinear(64, 64, bias=False)),
        "quantization differs: affine 4 bits by 64, none, none",
    ),
    (lambda: with_q(OtherLinear(64, 64)), "q_proj is OtherLinear"),
    (lambda: with_q(DoRALinear(64, 64)), "q_proj is DoRALinear"),
    (
        lambda: with_q(LoRALinear.from_base(nn.QuantizedLinear(64, 64))),
        "quantization differs: affine 4 bits by 64, none, none",
    ),
    (lambda: with_q(nn.Linear(64, 64, bias=True)), "only some have a bias"),
    (
        lambda: in_dtype(mx.float16, ["v_proj"]),
        "parameter types differ: mlx.core.float32, mlx.core.float32, mlx.core.float16",
    ),
    (with_a_bias_in_float16, "q_proj has parameters of mlx.core.float16, mlx.core.float32"),
    (lambda: in_dtype(mx.float64, PROJECTIONS), "q_proj has parameters of mlx.core.float64"),
]


@pytest.mark.parametrize("make_attention, obstacle", UNFUSED, ids=[reason for _, reason in UNFUSED])
def test_runs_each_layer_by_itself(make_attention, obstacle):
    attention, x = make_attention(), sample(2, 3, 64)
    expected = attention(x)
    report = mlx_fused.patch(attention)
    assert [layer.qkv.obstacle for layer in report.layers] == [obstacle]
    actual = attention(x)
    assert calls(actual)[0] == 0
    assert all(mx.allclose(a, e, rtol=1e-5, atol=1e-5) for a, e in zip(actual, expected, strict=True))


def test_sizes_that_are_those_of_no_heads():
    attention, x = with_q(nn.Linear(64, 50, bias=False)), sample(2, 3, 64)
    attention.q_proj.weight = sample(50, 64)
    expected = attention(x)
    assert mlx_fused.patch(attention).layers[0].qkv.fused
    actual = attention(x)
    assert calls(actual)[0] == 1
    assert_same(actual, expected)


def test_a_projection_without_outputs():
    attention = with_q(nn.Linear(64, 64, bias=False))
    attention.q_proj.weight = mx.zeros((0, 64))
    obstacle = "a projection has no outputs: (0, 32, 32)"
    assert mlx_fused.patch(attention).layers[0].qkv.obstacle == obstacle


@pytest.mark.parametrize("name, shape", [("bias", (1, 64)), ("bias", (1,)), ("bias", ())])
def test_parameters_of_unusual_shapes(name, shape):
    attention, x = with_q(nn.Linear(64, 64)), sample(1, 3, 64)
    attention.q_proj[name] = sample(*shape)
    expected = attention.q_proj(x)
    assert mlx_fused.patch(attention).layers[0].qkv.obstacle == "q_proj has parameters of unusual shapes"
    assert_same([attention(x)[0]], [expected])


def test_quantization_by_default_sizes():
    attention, x = Attention(), sample(1, 3, 64)
    nn.quantize(attention, 64, 4)
    mlx_fused.patch(attention)
    expected = attention(x)
    for name in PROJECTIONS:
        attention[name].group_size = attention[name].bits = None
    actual = attention(x)
    assert calls(actual) == (1, 0)
    assert_same(actual, expected)


def test_input_sizes_that_differ():  # which no input fits
    attention = with_q(nn.Linear(32, 64, bias=False))
    assert mlx_fused.patch(attention).layers[0].qkv.obstacle == "input sizes differ: (32, 64, 64)"
    with pytest.raises(ValueError, match="weight must have shape"):
        attention(sample(1, 3, 64))


@pytest.mark.parametrize("dtype", [mx.float64, mx.int32])
def test_an_input_type_without_kernels(dtype):
    attention, x = Attention(), sample(1, 3, 64).astype(dtype)
    expected = attention(x)
    mlx_fused.patch(attention)
    actual = attention(x)
    assert calls(actual)[0] == 0
    assert_same(actual, expected)


def test_a_class_without_call_keeps_its_class():
    attention = Uncallable()
    report = mlx_fused.patch(attention)
    assert [layer.qkv.obstacle for layer in report.layers] == ["Uncallable has no __call__"]
    assert type(attention) is Uncallable and not callable(attention)
