"""Patching among all else that happens to a model, in any order: the model is what it would have been."""

import copy
import pickle
from functools import partial

import mlx.core as mx
import mlx.nn as nn
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mlx.utils import tree_flatten, tree_unflatten
from mlx_lm.tuner.trainer import grad_checkpoint
from mlx_lm.tuner.utils import linear_to_lora_layers, remove_lora_layers

import mlx_fused
from test_models import assert_close
from tiny_models import LAYERS, loss, make, tokens

# What is done to one model of the two only


def patch(model, **options):
    mlx_fused.patch(model, **options)


PATCHES = {
    "patch": patch,
    "patch exact": partial(patch, exact=True),
    "patch without adapters": partial(patch, lora=False, o_residual=False),
    "patch the residual": partial(patch, qkv=False, o_residual=True),
    "unpatch": mlx_fused.unpatch,
}

# What is done to both; a new model where it returns one


def to_lora(model, rank=4, **options):
    linear_to_lora_layers(model, LAYERS, {"rank": rank, "scale": 2.0, "dropout": 0.0, **options})
    for name, module in model.named_modules():
        if "lora_b" in module:
            module.lora_b = 0.1 * mx.random.normal(module.lora_b.shape, key=mx.random.key(len(name)))


def fuse(model):
    """As mlx_lm.fuse does."""
    fused = [(name, module.fuse()) for name, module in model.named_modules() if hasattr(module, "fuse")]
    if fused:
        model.update_modules(tree_unflatten(fused))


def save_and_load(model, path):
    file = _new_file(path)
    model.save_weights(file)
    model.load_weights(file)


def save_and_load_adapters(model, path):
    file = _new_file(path)
    if adapters := dict(tree_flatten(model.trainable_parameters())):
        mx.save_safetensors(file, adapters)
        model.load_weights(file, strict=False)


def _new_file(path):
    return str(path / f"{len(list(path.iterdir()))}.safetensors")  # arrays stay in their file until used


def step(model):
    """One step of training by a compiled function."""
    nn.value_and_grad(model, loss)(model, tokens(2, 5))  # an error inside of compile would break the model
    state = [model.state]

    @partial(mx.compile, inputs=state, outputs=state)
    def train(inputs):
        _, gradients = nn.value_and_grad(model, loss)(model, inputs)
        scaled = [(name, -0.1 * g) for name, g in tree_flatten(gradients)]
        old = dict(tree_flatten(model.trainable_parameters()))
        model.update(tree_unflatten([(name, old[name] + g) for name, g in scaled]))

    train(tokens(2, 5))
    mx.eval(state)


def quantize_some(model):
    """As mixed recipes do, with other bits for some projections."""
    nn.quantize(model, 32, 8, class_predicate=lambda path, m: "v_proj" in path and hasattr(m, "to_quantized"))


STEPS = {
    "lora": to_lora,
    "lora with dropout": partial(to_lora, dropout=0.3),
    "lora of q and o": partial(to_lora, rank=3, keys=["self_attn.q_proj", "self_attn.o_proj"]),
    "quantize": lambda model: nn.quantize(model, 32, 4),
    "quantize some": quantize_some,
    "load": lambda model: model.load_weights(tree_flatten(model.parameters())),
    "load new": lambda model: model.load_weights(
        [(name, a + mx.zeros_like(a)) for name, a in tree_flatten(model.parameters())]
    ),
    "freeze": lambda model: model.freeze(),
    "unfreeze": lambda model: model.unfreeze(),
    "unfreeze adapters": lambda model: model.unfreeze(keys=["lora_a", "lora_b"], strict=False),
    "evaluation": lambda model: model.eval(),
    "training": lambda model: model.train(),
    "step": step,
    "deepcopy": copy.deepcopy,
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
    "shard": lambda model: model.shard(),
    "save and load": save_and_load,
    "save and load adapters": save_and_load_adapters,
    "fuse": fuse,
    "remove adapters": remove_lora_layers,
}


def do(action, model, path):
    """The model after ``action``, and what came of it if that is an error."""
    mx.random.seed(0)
    try:
        result = action(model, path) if action in (save_and_load, save_and_load_adapters) else action(model)
    except Exception as error:
        return model, type(error)
    return (result if isinstance(result, nn.Module) else model), None


def seen(model):
    """What a user sees of a model but what it computes."""
    names = [
        [name for name, _ in tree_flatten(p)] for p in (model.parameters(), model.trainable_parameters())
    ]
    return names, repr(model), model.state.keys()


def results(model):
    mx.random.seed(1)  # of dropout
    logits = model(tokens(2, 7))
    try:
        return [logits, nn.value_and_grad(model, loss)(model, tokens(2, 7))]
    except (RuntimeError, ValueError):  # no parameters to train, or quantized ones
        return [logits]


def check(sequence, path):
    model, stock = make("llama"), make("llama")
    block = type(stock.layers[0])
    own = block.__call__
    try:
        for name in sequence:
            if name in PATCHES:
                PATCHES[name](model)
            elif name == "checkpoint":
                grad_checkpoint(stock.layers[0])  # edits the class of both
            else:
                model, error = do(STEPS[name], model, path)
                stock, expected = do(STEPS[name], stock, path)
                assert error is expected, name
            assert seen(model) == seen(stock), name
        assert_close(results(model), results(stock), mx.float32)
    finally:
        block.__call__ = own


actions = st.sampled_from([*PATCHES, *STEPS, "checkpoint"])


@settings(max_examples=40)
@given(some=st.lists(actions, min_size=2, max_size=7))
def test_any_order(some, tmp_path_factory):
    check(some, tmp_path_factory.mktemp("orders"))


@pytest.mark.slow
@settings(max_examples=1500)
@given(some=st.lists(actions, min_size=2, max_size=12))
def test_any_longer_order(some, tmp_path_factory):
    check(some, tmp_path_factory.mktemp("orders"))


@pytest.mark.parametrize("first", STEPS)
@pytest.mark.parametrize("patches", ["before", "after"])
def test_before_and_after(first, patches, tmp_path):
    check(["patch", first] if patches == "before" else [first, "patch"], tmp_path)
