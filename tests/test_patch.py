"""What patching does to a model and what it leaves alone."""

import copy
import inspect
import pickle
import re

import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx.utils import tree_flatten
from mlx_lm.tuner.trainer import grad_checkpoint

import mlx_fused
from graph import output_counts
from mlx_fused.patching import registry
from tiny_models import LAYERS, Attention, assert_same, calls, fused, loss, make, sample, tokens

# The report


def test_report_lists_every_layer():
    model = make("llama")
    model.layers[1].self_attn.k_proj = model.layers[1].self_attn.k_proj.to_quantized(32, 4)
    report = mlx_fused.patch(model)
    assert [layer.qkv.fused for layer in report.layers] == [True, False]
    assert [layer.residual.fused for layer in report.layers] == [True, True]
    assert str(report) == repr(report)
    reason = "not fused: quantization differs: none, affine 4 bits by 32, none"
    model(tokens(1, 3))
    summary, *lines, last = str(report).splitlines()
    assert summary == (
        "mlx-fused: fused QKV 1 of 2, attention 2 of 2, MLP 2 of 2, output projection + residual 4 of 4, "
        "other layers 1 of 1, RMS norm 5 of 5"
    )
    assert [re.split("  +", line) for line in lines] == [
        [
            *("layer", "QKV", "calls*", "attention", "calls*", "MLP", "calls*"),
            *("output projection + residual", "calls*", "other layers", "calls*"),
        ],
        ["model.layers.0.self_attn", *("fused", "1/0") * 3],
        ["model.layers.0.mlp", "fused, silu", "1/0", "fused", "1/0"],
        ["model.layers.1.self_attn", reason, "0/1", *("fused", "1/0") * 2],
        ["model.layers.1.mlp", "fused, silu", "1/0", "fused", "1/0"],
        ["model", "fused", "1/0"],
    ]
    assert last == "* in one operation of ours/otherwise"


def test_report_is_in_the_order_of_the_layers():
    model = nn.Sequential(*(Attention() for _ in range(12)))
    names = [layer.name for layer in mlx_fused.patch(model).layers]
    assert names == [f"layers.{i}" for i in range(12)]


def test_nothing_to_patch():
    report = mlx_fused.patch(nn.Sequential(nn.Linear(4, 4)))
    assert not report.layers
    assert str(report) == ("mlx-fused: nothing to patch, no linear layer in a module that calls it")


def test_summary_of_one_layer():
    report = mlx_fused.patch(Attention())
    assert (
        report.summary == "mlx-fused: fused QKV 1 of 1, attention 0 of 1, output projection + residual 0 of 1"
    )


def test_nothing_is_printed_unless_asked_for(capfd, monkeypatch):
    monkeypatch.setattr(mx.distributed, "init", None)  # nor waits for other ranks
    model = make("llama")
    report = mlx_fused.patch(model)
    with mlx_fused.patched(model):
        mlx_fused.unpatch(model)
    assert capfd.readouterr() == ("", "")
    report = mlx_fused.patch(model, verbose=True)
    assert capfd.readouterr() == ("", f"{report}\n")


@pytest.mark.parametrize("thing", [None, "model", {"q_proj": 1}, nn.Linear])
def test_only_a_module_can_be_patched(thing):
    name = type(thing).__name__
    with pytest.raises(TypeError, match=f"model must be an mlx.nn.Module but got {name}"):
        mlx_fused.patch(thing)
    with pytest.raises(TypeError, match=f"got {name}"):
        mlx_fused.unpatch(thing)
    with pytest.raises(TypeError, match=f"got {name}"), mlx_fused.patched(thing):
        pass


def test_one_attention_module_is_a_model():
    attention = Attention()
    report = mlx_fused.patch(attention)
    assert [(layer.name, layer.qkv.fused) for layer in report.layers] == [("Attention", True)]


# Going in and out


def snapshot(model):
    """Everything a user can see of a model but what it computes."""
    modules = [(name, type(m).__name__, m.training) for name, m in model.named_modules()]
    arrays = [(name, id(array)) for name, array in tree_flatten(model.parameters())]
    trainable = [name for name, _ in tree_flatten(model.trainable_parameters())]
    attributes = [vars(m).keys() for m in model.modules()]
    return modules, arrays, trainable, repr(model), attributes


def test_only_the_class_changes():
    model = make("qwen3")
    model.layers[0].freeze()
    before, classes = snapshot(model), [type(m) for m in model.modules()]
    mlx_fused.patch(model)
    model(tokens(1, 3))
    assert snapshot(model) == before
    assert isinstance(model.layers[0].self_attn, type(make("qwen3").layers[0].self_attn))
    changed = {type(m) for m, cls in zip(model.modules(), classes, strict=True) if type(m) is not cls}
    layer = model.layers[0]
    patched = model, layer.self_attn, layer.mlp, layer.input_layernorm
    assert changed == {type(m) for m in patched}  # one for all layers
    mlx_fused.unpatch(model)
    assert snapshot(model) == before
    assert [type(m) for m in model.modules()] == classes


def test_patching_twice_is_patching_once():
    model = make("llama")
    first, cls = mlx_fused.patch(model), type(model.layers[0].self_attn)
    assert mlx_fused.patch(model) == first
    assert type(model.layers[0].self_attn) is cls
    mlx_fused.unpatch(model)
    mlx_fused.unpatch(model)
    assert fused(model(tokens(1, 3))) == (0, 0)


def test_patching_again_changes_the_options():
    model = make("llama")
    first = mlx_fused.patch(model)
    model(tokens(1, 3))
    second = mlx_fused.patch(model, qkv=False)
    assert {layer.qkv.obstacle for layer in second.layers} == {"qkv=False"}
    assert fused(model(tokens(1, 3))) == (0, 0)
    calls = first.layers[0].qkv.calls
    assert (calls.fused, calls.fallen_back) == (1, 1)  # counted on
    with mlx_fused.patched(model, o_residual=False) as report:
        assert {layer.residual.obstacle for layer in report.layers} == {"o_residual=False"}
        assert fused(model(tokens(1, 3))) == (LAYERS, 0)
    assert fused(model(tokens(1, 3))) == (0, 0)
    assert mlx_fused.patch(model, qkv=False) == second


def test_the_environment_turns_it_off(monkeypatch):
    model = make("llama")
    stock = model(tokens(1, 3))
    report = mlx_fused.patch(model)
    for off in ("0", "false", "off", "no", "False", "OFF"):
        monkeypatch.setenv("MLX_FUSED", off)
        assert mx.array_equal(model(tokens(1, 3)), stock)
        assert report.layers[0].qkv.calls.total == report.layers[0].residual.calls.total == 0
        assert report.summary.endswith(f"RMS norm 5 of 5; MLX_FUSED={off} keeps all of it off")
    for nonsense in ("2", "offf", " ", "none"):
        monkeypatch.setenv("MLX_FUSED", nonsense)
        for use in (lambda: model(tokens(1, 3)), lambda: mlx_fused.patch(model)):
            with pytest.raises(ValueError, match=f"'0', 'false', .* but got '{nonsense}'"):
                use()
    for on in ("1", "", "true", "on", "yes", "Yes"):
        monkeypatch.setenv("MLX_FUSED", on)
        assert fused(model(tokens(1, 3))) == (LAYERS, 0)
        assert report.summary.endswith("RMS norm 5 of 5")
    monkeypatch.delenv("MLX_FUSED")
    assert fused(model(tokens(1, 3))) == (LAYERS, 0)


def test_patched_ends_with_its_block():
    model = make("llama")
    with mlx_fused.patched(model) as report:
        assert len(report.layers) == LAYERS
        assert fused(model(tokens(1, 3))) == (LAYERS, 0)
    assert fused(model(tokens(1, 3))) == (0, 0)
    with pytest.raises(KeyError), mlx_fused.patched(model):
        raise KeyError
    assert fused(model(tokens(1, 3))) == (0, 0)


def test_patched_leaves_what_was_patched_before():
    model = make("llama")
    mlx_fused.patch(model.layers[1])
    with mlx_fused.patched(model):
        assert fused(model(tokens(1, 3))) == (LAYERS, 0)
    assert fused(model(tokens(1, 3))) == (1, 0)


def test_unpatching_within_the_block_ends_with_it():
    model = make("llama")
    mlx_fused.patch(model.layers[1])
    with mlx_fused.patched(model):
        mlx_fused.unpatch(model)
        assert fused(model(tokens(1, 3))) == (0, 0)
    assert fused(model(tokens(1, 3))) == (1, 0)
    mlx_fused.unpatch(model)


class Registered(Attention):
    """Counts its subclasses, which must have a name."""

    names = ()

    def __init_subclass__(cls, /, name, **kwargs):
        super().__init_subclass__(**kwargs)
        Registered.names += (name,)


class Named(Registered, name="named"):
    pass


def test_a_class_that_knows_its_subclasses():
    attention, x = Named(), sample(1, 3, 64)
    expected = attention(x)
    mlx_fused.patch(attention)
    assert calls(attention(x)) == (1, 0)
    assert_same(attention(x), expected)
    assert Registered.names == ("named",)
    mlx_fused.unpatch(attention)

    class Next(Named, name="next"):  # of the class itself, which is as before
        pass

    assert Registered.names == ("named", "next")


class Final(type(Attention)):
    def __new__(mcs, name, bases, members):
        if any(isinstance(base, Final) for base in bases):
            raise TypeError("final")
        return super().__new__(mcs, name, bases, members)


class Sealed(Attention, metaclass=Final):
    pass


def test_a_class_that_cannot_have_subclasses():
    model, x = nn.Sequential(Attention(), Sealed()), sample(1, 3, 64)
    expected = model.layers[1](x)
    first, second = mlx_fused.patch(model).layers
    assert first.qkv.fused
    assert second.qkv.obstacle == second.residual.obstacle == "Sealed cannot be subclassed: final"
    assert type(model.layers[1]) is Sealed
    assert_same(model.layers[1](x), expected)


class Static(Attention):
    @staticmethod
    def __call__(x):
        return x


class Frozen(Attention):
    def __setattr__(self, name, value):
        if name == "__class__" or self.__dict__.get("is_frozen"):
            raise AttributeError("frozen")
        super().__setattr__(name, value)


def test_classes_with_other_ideas():
    static, frozen, x = Static(), Frozen(), sample(1, 3, 64)
    mlx_fused.patch(static)
    assert static(x) is x
    mlx_fused.patch(frozen)
    vars(frozen)["is_frozen"] = True
    assert calls(frozen(x)) == (1, 0)
    mlx_fused.unpatch(frozen)
    assert type(frozen) is Frozen


def test_a_patched_class_looks_like_its_own():
    attention = Attention()
    signature, source = inspect.signature(attention.__call__), inspect.getsource(Attention)
    mlx_fused.patch(attention)
    assert inspect.signature(attention.__call__) == signature
    assert inspect.getsource(type(attention)) == source
    assert repr(type(attention)) == repr(Attention)


def test_more_of_a_patched_class():
    attention, x = Attention(), sample(1, 3, 64)
    mlx_fused.patch(attention)
    twin = type(attention)()
    assert calls(twin(x)) == (0, 3)  # nobody patched it
    with mlx_fused.patched(twin):
        assert calls(twin(x)) == (1, 0)
    assert calls(twin(x)) == (0, 3)
    mlx_fused.patch(twin)
    mlx_fused.unpatch(twin)
    assert type(twin) is Attention

    class Doubled(type(attention)):
        def __call__(self, x):
            return tuple(2 * y for y in super().__call__(x))

    attention.__class__ = Doubled
    mlx_fused.unpatch(attention)
    assert type(attention) is Doubled
    assert_same(attention(x), [2 * y for y in Attention.__call__(attention, x)])
    assert calls(attention(x)) == (0, 3)


class Reduced(Attention):
    def __init__(self, dims=64):
        super().__init__(dims)
        self.dims = dims

    def __reduce__(self):
        return type(self), (self.dims,)


# The rest of the model's life


def pickled(module):
    return pickle.loads(pickle.dumps(module))


@pytest.mark.parametrize("cls", [Attention, Reduced])
@pytest.mark.parametrize("copy_of", [copy.deepcopy, copy.copy, pickled])
def test_copies_are_patched(cls, copy_of):
    attention, x = cls(), sample(1, 3, 64)
    mlx_fused.patch(attention)
    other = copy_of(attention)
    assert type(other) is type(attention) and other is not attention
    assert calls(other(x)) == (1, 0)
    if cls is Attention:
        assert_same(other(x), attention(x))
    mlx_fused.unpatch(other)
    assert type(other) is cls and calls(attention(x)) == (1, 0)


@pytest.mark.parametrize("copy_of", [copy.deepcopy, copy.copy, pickled])
def test_a_copy_made_in_a_call_that_unpatches(copy_of):
    attention = Copies()
    mlx_fused.patch(attention)
    copied, projection = attention(copy_of)
    assert type(attention) is type(copied) is Copies and type(projection) is nn.Linear


class Copies(Attention):
    def __call__(self, copy_of):
        mlx_fused.unpatch(self)
        return copy_of(self), copy_of(self.q_proj)


def test_deepcopy_of_a_model():
    model = make("qwen2")
    mlx_fused.patch(model)
    other = copy.deepcopy(model)
    assert fused(other(tokens(1, 4))) == (LAYERS, 0)
    assert mx.array_equal(other(tokens(1, 4)), model(tokens(1, 4)))
    shared = {id(a) for a in model.modules()} & {id(a) for a in other.modules()}
    assert not shared


@pytest.mark.parametrize("protocol", range(2, pickle.HIGHEST_PROTOCOL + 1))
def test_pickle(protocol):
    model = make("llama")
    model.layers[0].freeze()
    mlx_fused.patch(model)
    other = pickle.loads(pickle.dumps(model, protocol))
    assert fused(other(tokens(1, 4))) == (LAYERS, 0)
    assert mx.array_equal(other(tokens(1, 4)), model(tokens(1, 4)))
    for parameters in (nn.Module.parameters, nn.Module.trainable_parameters):
        names = [[name for name, _ in tree_flatten(parameters(m))] for m in (model, other)]
        assert names[0] == names[1]


@pytest.mark.parametrize("protocol", [0, 1])
def test_pickle_protocols_without_arrays(protocol):
    attention = Attention()
    for _ in range(2):
        with pytest.raises(TypeError, match="array"):
            pickle.dumps(attention, protocol)
        mlx_fused.patch(attention)


def test_save_and_load(tmp_path):
    model, other = make("qwen2"), make("qwen2")
    stock, patched = tmp_path / "stock.safetensors", tmp_path / "patched.safetensors"
    model.save_weights(str(stock))
    mlx_fused.patch(model)
    model.save_weights(str(patched))
    saved = [mx.load(str(path)) for path in (stock, patched)]
    assert saved[0].keys() == saved[1].keys()
    assert all(mx.array_equal(saved[0][name], saved[1][name]) for name in saved[0])

    expected = model(tokens(1, 4))
    other.apply(mx.zeros_like)
    mlx_fused.patch(other)
    other.load_weights(str(stock))  # new arrays in patched modules
    assert mx.array_equal(other(tokens(1, 4)), expected)


def test_frozen_weights_cost_no_gradient():
    model = make("llama")
    mlx_fused.patch(model)
    for layer in model.layers:
        layer.self_attn.freeze()
    _, gradients = nn.value_and_grad(model, loss)(model, tokens(1, 5))
    names = [name for name, _ in tree_flatten(gradients)]
    assert names and not any("self_attn" in name for name in names)
    arrays = [g for _, g in tree_flatten(gradients)]
    assert output_counts("FusedQKVProjectionGrad", *arrays) == [1] * LAYERS

    model.layers[0].self_attn.q_proj.unfreeze()
    _, gradients = nn.value_and_grad(model, loss)(model, tokens(1, 5))
    arrays = [g for _, g in tree_flatten(gradients)]
    assert sorted(output_counts("FusedQKVProjectionGrad", *arrays)) == [1, 2]


@pytest.mark.parametrize("option", ["qkv", "mlp", "linear", "lora", "exact"])
def test_options_are_true_or_false(option):
    with pytest.raises(ValueError, match=f"{option} must be True or False but got 2"):
        mlx_fused.patch(make("llama"), **{option: 2})


@pytest.mark.parametrize(
    ("options", "reasons"),
    [({}, (None, None)), ({"qkv": False, "o_residual": False}, ("qkv=False", "o_residual=False"))],
    ids=str,
)
def test_calls_tell_why_they_fell_back(options, reasons):
    model = make("llama")
    report = mlx_fused.patch(model, **options)
    model(tokens(1, 3))
    for layer in report.layers:
        assert (layer.qkv.calls.reason, layer.residual.calls.reason) == reasons


@pytest.mark.parametrize("copy_of", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_keep_the_options_and_count_for_themselves(copy_of):
    model = make("llama")
    report = mlx_fused.patch(model, qkv=False, exact=True)
    other = copy_of(model)
    other(tokens(1, 3))
    assert report.layers[0].residual.calls.total == 0
    own = registry.patch_of(other.layers[0].self_attn)
    assert own.options == registry.patch_of(model.layers[0].self_attn).options
    assert own.calls["residual"].fused == own.calls["qkv"].fallen_back == 1


def test_a_projection_can_be_replaced_and_removed():
    attention, x = Attention(), sample(1, 3, 64)
    mlx_fused.patch(attention)
    attention.k_proj = Attention().k_proj
    assert_same([attention(x)[1]], [x @ attention.k_proj.weight.T])
    attention.v_proj = None
    assert attention.v_proj is None
    attention.v_proj = Attention().v_proj
    assert calls(attention(x)) == (1, 0)
    del attention.v_proj
    assert not hasattr(attention, "v_proj")
    with pytest.raises(AttributeError, match="v_proj"):
        attention(x)
    with pytest.raises(AttributeError, match="v_proj"):
        del attention.v_proj
    assert mlx_fused.patch(attention).layers[0].qkv.obstacle == "v_proj is NoneType"


def test_checkpointing_the_attention_class_reaches_all_layers(monkeypatch):
    model = make("llama")
    mlx_fused.patch(model)
    cls = type(model.layers[0].self_attn)
    monkeypatch.setattr(cls, "__call__", cls.__call__)  # grad_checkpoint edits the class
    grad_checkpoint(model.layers[0].self_attn)
    _, gradients = nn.value_and_grad(model, loss)(model, tokens(1, 5))
    assert fused(*(g for _, g in tree_flatten(gradients))) == (2 * LAYERS, LAYERS)
