"""Patching and unpatching while other threads call the model: a running call ends as it began."""

import copy
import sys
import threading
import time
from contextlib import contextmanager

import mlx.core as mx
import mlx.nn as nn
import pytest

import mlx_fused
from mlx_fused.patching.modules import FusedModule
from tiny_models import Attention, calls, sample


@pytest.fixture(params=[1e-6, 1e-4, 5e-3], ids=str)
def switch_interval(request):
    """How often Python's threads take turns, in seconds."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(request.param)
    yield
    sys.setswitchinterval(before)


@contextmanager
def in_background(work, count):
    """Runs ``work(number)`` again and again in threads until the block ends; raises what they raised."""
    stop, errors, started = threading.Event(), [], threading.Barrier(count + 1)

    def loop(number):
        mx.set_default_device(mx.cpu)
        started.wait()
        try:
            while not stop.is_set():
                work(number)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=loop, args=(i,)) for i in range(count)]
    for thread in threads:
        thread.start()
    started.wait()
    try:
        yield errors
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    if errors:
        raise errors[0]


class Whole(Attention):
    """Its calls record what each projection was computed by."""

    def __init__(self):
        super().__init__()
        self.o_proj = nn.Linear(64, 64, bias=False)

    def __call__(self, x):
        q, k, v = self.q_proj(x), self.k_proj(x), self.v_proj(x)
        return q, k, v, self.o_proj(q)


class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        self.self_attn = Whole()

    def __call__(self, x):
        q, k, v, o = self.self_attn(x)
        return q, k, v, x + o


def toggle(layer):
    mlx_fused.patch(layer)
    mlx_fused.unpatch(layer)


def toggle_options(layer):
    mlx_fused.patch(layer, o_residual=True)
    mlx_fused.patch(layer.self_attn, qkv=False)
    mlx_fused.unpatch(layer)


def toggle_for_a_block(layer):
    with mlx_fused.patched(layer):
        pass


@pytest.mark.parametrize("change", [toggle, toggle_options, toggle_for_a_block])
def test_patching_under_load(switch_interval, change):
    layer, x = Layer(), sample(1, 3, 64)
    attention = layer.self_attn
    expected = attention(x)[:3]
    mx.eval(expected)
    kinds, wrong = set(), []

    def call(_):
        projected = attention(x)[:3]
        kinds.add(calls(projected))
        if not all(mx.array_equal(a, e) for a, e in zip(projected, expected, strict=True)):
            wrong.append(projected)

    with in_background(call, 3):
        for _ in range(1000):
            change(layer)
    assert kinds <= {(1, 0), (0, 3)}  # all three fused, or none
    assert not wrong
    assert type(attention) is Whole


def test_several_threads_patch_and_unpatch(switch_interval):
    layer, x, rounds = Layer(), sample(1, 3, 64), [0] * 4
    changes = (toggle, toggle_options)

    def work(number):
        if number < len(changes):
            changes[number](layer)
        else:
            layer(x)
        rounds[number] += 1

    with in_background(work, 4) as errors:
        while min(rounds) < 100 and not errors:
            time.sleep(0.001)
    mlx_fused.unpatch(layer)
    assert type(layer.self_attn) is Whole


@pytest.mark.parametrize("copy_of", [copy.copy, copy.deepcopy])
def test_copying_under_load(switch_interval, copy_of):
    layer, made = Layer(), []
    mx.eval(layer.parameters())  # in the thread that made them

    def work(number):
        toggle(layer) if number else made.append(copy_of(layer))

    with in_background(work, 2) as errors:
        while len(made) < 200 and not errors:
            time.sleep(0.001)
    for other in made:
        mlx_fused.unpatch(other)
        assert type(other.self_attn) is Whole and vars(other.self_attn).keys() == vars(Whole()).keys()


class Interrupted(Attention):
    """Does something between two of its projections, once."""

    def __init__(self):
        super().__init__()
        self.between = None

    def __call__(self, x):
        q = self.q_proj(x)
        between, self.between = self.between, None
        if between:
            between(self)
        return q, self.k_proj(x), self.v_proj(x)


FUSED, STOCK = (1, 0), (0, 3)  # calls of fused operations and of products


def unpatch_and_call(attention):
    mlx_fused.unpatch(attention)
    assert calls(attention(sample(1, 3, 64))) == STOCK  # a call that begins after unpatching


@pytest.mark.parametrize(
    "is_patched, between, after",
    [
        (False, mlx_fused.patch, FUSED),
        (True, lambda attention: mlx_fused.patch(attention, qkv=False), STOCK),
        (True, mlx_fused.unpatch, STOCK),
        (True, unpatch_and_call, STOCK),
        (True, toggle_for_a_block, FUSED),
        (True, lambda attention: (mlx_fused.unpatch(attention), mlx_fused.patch(attention)), FUSED),
    ],
)
def test_a_running_call_ends_as_it_began(is_patched, between, after):
    attention, x = Interrupted(), sample(1, 3, 64)
    if is_patched:
        mlx_fused.patch(attention)
    attention.between = between
    assert calls(attention(x)) == (FUSED if is_patched else STOCK)
    assert isinstance(attention, FusedModule) == (between not in (mlx_fused.unpatch, unpatch_and_call))
    assert calls(attention(x)) == after


def test_an_error_in_a_call_ends_the_patching_too():
    def fail(attention):
        mlx_fused.unpatch(attention)
        raise RuntimeError("no keys today")

    attention = Interrupted()
    attention.between = fail
    mlx_fused.patch(attention)
    with pytest.raises(RuntimeError, match="no keys today"):
        attention(sample(1, 3, 64))
    assert type(attention) is Interrupted


def test_counters_lose_nothing(switch_interval):
    attention, x = Attention(), sample(1, 3, 64)
    report, made = mlx_fused.patch(attention), [0] * 4

    def call(number):
        attention(x)
        made[number] += 1

    with in_background(call, 4) as errors:
        while sum(made) < 2000 and not errors:
            time.sleep(0.001)
    counted = report.layers[0].qkv.calls
    assert counted.total == counted.fused == sum(made)


def test_one_class_for_all_layers_whoever_patches(switch_interval):
    class Own(Attention):
        pass

    layers = [Own() for _ in range(8)]
    todo = list(layers)

    def patch(_):
        if todo:
            mlx_fused.patch(todo.pop())

    with in_background(patch, 4) as errors:
        while todo and not errors:
            time.sleep(0.001)
    assert len({type(layer) for layer in layers}) == 1


def test_patching_within_patching():
    class Meta(type):
        def __new__(mcs, name, bases, members):
            # As a generator does that is collected then, and closes its patched block.
            mlx_fused.unpatch(other)
            return super().__new__(mcs, name, bases, members)

    other = Attention()
    mlx_fused.patch(other)
    attention = Meta("Own", (Attention,), {})()
    mlx_fused.patch(other)
    done = threading.Thread(target=mlx_fused.patch, args=(attention,), daemon=True)
    done.start()
    done.join(60)
    assert not done.is_alive() and type(other) is Attention and isinstance(attention, FusedModule)
