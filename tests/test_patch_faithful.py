"""What stands in for a projection while its attention runs is that projection in everything but the call."""

import contextvars
import copy
import pickle
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx.utils import tree_flatten
from mlx_lm.tuner.lora import LoRALinear

import mlx_fused
from mlx_fused.patching.stand_in import StandIn
from tiny_models import Attention, assert_same, calls, integers, sample

ASKED = {
    "isinstance": lambda m: [isinstance(m, cls) for cls in (nn.Linear, nn.Module, dict, nn.QuantizedLinear)],
    "class": lambda m: m.__class__,
    "in": lambda m: ("bias" in m, "weight" in m, "nothing" in m),
    "item": lambda m: m["weight"].shape,
    "no such item": lambda m: m["nothing"],
    "attribute": lambda m: (m.weight.shape, m.training, m.name, m.__dict__.keys()),
    "no such attribute": lambda m: m.nothing,
    "get": lambda m: m.get("nothing", 1),
    "iteration": lambda m: (list(m), len(m), bool(m), list(reversed(m)), sorted(m.keys()), {**m}.keys()),
    "text": lambda m: (str(m), repr(m), f"{m}", f"{m!r:>50}"),
    "hash": hash,
    "equality": lambda m: (m == m, m != m, m == 1, m == copy.copy(m)),
    "dir": dir,
    "vars": lambda m: vars(m).keys(),
    "tree": lambda m: [(name, a.shape) for name, a in tree_flatten(m.parameters())],
    "modules": lambda m: [type(x) for x in m.modules()][1:],
    "union": lambda m: (m | {"a": 1}).keys(),
    "pickled": lambda m: type(pickle.loads(pickle.dumps(m))),
    "deep copy": lambda m: type(copy.deepcopy(m)),
    "copy": lambda m: (type(copy.copy(m)), copy.copy(m)["weight"] is m["weight"]),
    "match": lambda m: _matched(m),
    "size": lambda m: m.__sizeof__(),
}
PROJECTIONS = {
    "Linear": lambda: nn.Linear(64, 64),
    "QuantizedLinear": lambda: nn.QuantizedLinear(64, 64),
    "LoRALinear": lambda: _lora(nn.Linear(64, 64)),
}


def _lora(linear):
    layer = LoRALinear.from_base(linear)
    layer.weight = layer.linear.weight  # for what is asked of all kinds alike
    return layer


def _matched(module):
    match module:
        case nn.Linear(weight=weight):
            return weight.shape
    return None


def outcome(ask, module):
    try:
        return ask(module)
    except (AttributeError, KeyError, TypeError) as error:
        return type(error), str(error)


class Asks(Attention):
    """Asks something of its projection before calling it."""

    def __init__(self, ask, projection):
        super().__init__(bias=True)
        self.q_proj = projection
        self.q_proj.name = "queries"
        self.ask = ask
        self.answers = ()

    def __call__(self, x):
        self.answers += (outcome(self.ask, self.q_proj),)
        return super().__call__(x)


@pytest.mark.parametrize("kind", PROJECTIONS)
@pytest.mark.parametrize("ask", ASKED)
def test_whatever_is_asked_of_it(kind, ask):
    attention, x = Asks(ASKED[ask], PROJECTIONS[kind]()), sample(1, 3, 64)
    attention(x)
    mlx_fused.patch(attention)
    attention(x)
    expected, actual = attention.answers
    assert actual == expected


class Does(Attention):
    def __init__(self, do):
        super().__init__(bias=True)
        self.do = do

    def __call__(self, x):
        return self.do(self, x)


def project(attention, x):
    return attention.q_proj(x), attention.k_proj(x), attention.v_proj(x)


def sets_before(attention, x):
    attention.q_proj.weight = attention.q_proj.weight + 1
    return project(attention, x)


def sets_between(attention, x):
    q = attention.q_proj(x)
    attention.k_proj.weight = attention.k_proj.weight + 1
    attention.v_proj["bias"] = attention.v_proj["bias"] + 1
    return q, attention.k_proj(x), attention.v_proj(x)


def changes_in_place_between(attention, x):
    q = attention.q_proj(x)
    attention.k_proj.weight *= 2
    weight = attention.v_proj["weight"]
    weight += 1
    return q, attention.k_proj(x), attention.v_proj(x)


def updates_between(attention, x):
    q = attention.q_proj(x)
    attention.k_proj.update({"bias": attention.k_proj.bias + 1})
    attention.v_proj.pop("bias", None)
    return q, attention.k_proj(x), attention.v_proj(x)


def deletes(attention, x):
    for projection in (attention.q_proj, attention.k_proj, attention.v_proj):
        if "bias" in projection:
            del projection.bias
    return project(attention, x)


def replaces_between(attention, x):
    q = attention.q_proj(x)
    attention.k_proj = nn.Linear(64, 32, bias=False)
    attention.k_proj.weight = mx.ones((32, 64))
    return q, attention.k_proj(x), attention.v_proj(x)


def ties(attention, x):
    attention.k_proj = attention.v_proj
    return project(attention, x)


def by_keyword(attention, x):
    return attention.q_proj(x=x), attention.k_proj(x=x), attention.v_proj(x=x)


def by_its_method(attention, x):
    return attention.q_proj.__call__(x), attention.k_proj.__call__(x), attention.v_proj.__call__(x)


def by_its_class(attention, x):
    return nn.Linear.__call__(attention.q_proj, x), attention.k_proj(x), attention.v_proj(x)


def freezes(attention, x):
    attention.q_proj.freeze()
    return project(attention, x)


def keeps(attention, x):
    attention.kept = [attention.q_proj]
    return project(attention, x)


def becomes_another_class(attention, x):
    k = attention.k_proj
    q = attention.q_proj(x)
    k.__class__ = Negative
    results = q, k(x), attention.v_proj(x)
    k.__class__ = nn.Linear
    return results


class Negative(nn.Linear):
    def __call__(self, x):
        return -super().__call__(x)


def adapts(attention, x):
    if not isinstance(attention.q_proj, LoRALinear):
        attention.q_proj = LoRALinear.from_base(attention.q_proj)
        attention.more = [nn.Sequential(attention.k_proj), (attention.v_proj, {"o": attention.k_proj})]
        attention.q_proj.lora_b = mx.ones(attention.q_proj.lora_b.shape)
        attention.q_proj.lora_a = mx.ones(attention.q_proj.lora_a.shape)
    return project(attention, x)


def swaps(attention, x):
    attention.k_proj, attention.v_proj = attention.v_proj, attention.k_proj
    return project(attention, x)


@pytest.mark.parametrize(
    "do",
    [
        sets_before, sets_between, changes_in_place_between, updates_between, deletes, replaces_between, ties,
        by_keyword, by_its_method, by_its_class, freezes, keeps, becomes_another_class, adapts, swaps,
    ],
)  # fmt: skip
def test_whatever_is_done_with_it(do):
    stock, patched, x = Does(do), Does(do), sample(1, 3, 64)
    patched.update(copy.deepcopy(stock.parameters()))
    mlx_fused.patch(patched)
    for _ in range(2):
        assert_same(patched(x), stock(x))
    names = [[name for name, _ in tree_flatten(m.parameters())] for m in (stock, patched)]
    assert names[0] == names[1]
    assert_same([a for _, a in tree_flatten(patched)], [a for _, a in tree_flatten(stock)])
    trainable = [[name for name, _ in tree_flatten(m.trainable_parameters())] for m in (stock, patched)]
    assert trainable[0] == trainable[1]
    assert not any(type(item) is StandIn for item in everything(patched))


def everything(value):
    """All that is in a tree of modules and containers, as it is stored."""
    yield value
    if isinstance(value, (dict, list, tuple)):
        for item in dict.values(value) if isinstance(value, dict) else value:
            yield from everything(item)


@pytest.mark.parametrize("change", [nn.Module.train, lambda k: setattr(k, "dropout", nn.Identity())])
def test_an_adapter_whose_dropout_changes_between_two_projections(change):
    def between(attention, x):
        q = attention.q_proj(x)
        change(attention.k_proj)
        return q, attention.k_proj(x), attention.v_proj(x)

    def run(attention):
        mx.random.seed(3)
        return attention(sample(2, 3, 64))

    attention = Does(between)
    for name in ("q_proj", "k_proj", "v_proj"):
        attention[name] = LoRALinear.from_base(attention[name], dropout=0.5)
        for factor in ("lora_a", "lora_b"):
            attention[name][factor] = integers(attention[name][factor].shape)
    attention.eval()
    if change is not nn.Module.train:
        attention.k_proj.train()
    stock = copy.deepcopy(attention)
    mlx_fused.patch(attention)
    assert_same(run(attention), run(stock))


@pytest.mark.parametrize("in_thread", [False, True])
def test_a_copied_context_has_no_part_in_the_call(in_thread):
    def copies(attention, x):
        context = contextvars.copy_context()
        run = partial(context.run, lambda: project(attention, x))
        if not in_thread:
            later.append(run)
            return project(attention, x)
        with ThreadPoolExecutor(1) as pool:
            return pool.submit(lambda: (mx.set_default_device(mx.cpu), run())[1]).result()

    later, attention, x = [], Does(copies), sample(1, 3, 64)
    mlx_fused.patch(attention)
    outputs = attention(x)
    assert calls(outputs) == ((0, 3) if in_thread else (1, 0))
    for run in later:
        assert calls(run()) == (0, 3)


def test_one_projection_is_one_object():
    attention = Does(lambda self, x: (self.q_proj is self.q_proj, self.q_proj is self.k_proj))
    mlx_fused.patch(attention)
    assert attention(sample(1, 3, 64)) == (True, False)
    attention.k_proj = attention.v_proj
    attention.do = lambda self, x: (self.k_proj == self.v_proj, self.k_proj != self.v_proj)
    assert attention(sample(1, 3, 64)) == (True, False)


def test_after_its_call_it_is_the_module():
    attention, x, kept = (
        Does(lambda self, x: (kept.append(self.q_proj), project(self, x))[1]),
        sample(1, 3, 64),
        [],
    )
    mlx_fused.patch(attention)
    attention(x)
    assert calls([kept[0](x)]) == (0, 1)
    attention.q_proj.weight = integers((64, 64))
    assert_same([kept[0](x)], [attention.q_proj(x)])


class Scaled(nn.Linear):
    """A layer of somebody's own, called with more than its input."""

    def __call__(self, x, factor=1.0):
        return factor * super().__call__(x)


def test_a_layer_of_another_type_is_not_stood_in_for():
    seen = []

    def scaled(self, x):
        seen.append(self.q_proj)
        return self.q_proj(x, 2.0), self.k_proj(x), self.v_proj(x)

    attention, x = Does(scaled), sample(1, 3, 64)
    attention.q_proj = Scaled(64, 64)
    expected = attention(x)
    report = mlx_fused.patch(attention)
    assert_same(attention(x), expected)
    assert seen[0] is seen[1] is attention.q_proj
    assert report.layers[0].qkv.obstacle == "q_proj is Scaled"
    assert (report.layers[0].qkv.calls.fused, report.layers[0].qkv.calls.fallen_back) == (0, 1)


# The output projection's operands are those at its call, whatever happens to them until the residual is added


class Layer(nn.Module):
    def __init__(self, change, projection):
        super().__init__()
        self.self_attn = nn.Module()
        self.self_attn = OutputOnly(projection)
        self.change = change

    def __call__(self, x):
        r = self.self_attn(x)
        self.change(self.self_attn.o_proj, x)
        return x + r


class OutputOnly(Attention):
    def __init__(self, projection):
        super().__init__()
        self.o_proj = projection

    def __call__(self, x):
        return self.o_proj(x)


def in_place(projection, x):
    base = projection.get("linear", projection)
    for module in {id(m): m for m in (projection, base)}.values():
        for name, a in module.items():
            if isinstance(a, mx.array):
                if a.dtype == mx.uint32:
                    a ^= 1
                else:
                    a *= 0.5
                assert module[name] is a
    if "linear" in projection:
        projection.scale *= 3


def by_update(projection, x):
    projection.update({name: a + 1 for name, a in projection.items() if isinstance(a, mx.array)})


@pytest.mark.parametrize("change", [in_place, by_update])
@pytest.mark.parametrize(
    "projection",
    [
        lambda: nn.Linear(64, 64),
        lambda: nn.QuantizedLinear(64, 64, mode="mxfp4", group_size=32),
        lambda: nn.QuantizedLinear(64, 64),
        lambda: LoRALinear.from_base(nn.Linear(64, 64)),
        lambda: LoRALinear.from_base(nn.QuantizedLinear(64, 64)),
    ],
)
def test_weights_changed_before_the_addition(change, projection):
    layer, x = Layer(lambda *_: None, projection()), sample(1, 3, 64)
    if "lora_b" in layer.self_attn.o_proj:
        layer.self_attn.o_proj.lora_b = integers(layer.self_attn.o_proj.lora_b.shape)
    report = mlx_fused.patch(layer)
    expected = layer(x)
    mx.eval(expected)
    layer.change = change
    assert_same([layer(x)], [expected])
    assert report.layers[0].residual.calls.fused == 2
