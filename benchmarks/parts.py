"""Where the time of a patched model goes, and how long stock and patched take to build a graph."""

from collections.abc import Callable, Sequence

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.cache import make_prompt_cache

import mlx_fused
from cases import GROUP_SIZE
from timing import Effort, quickest
from whole import CONTEXT, NO_ATTENTION, NO_HEAD, NO_MLP, Config, Family, Work

LAYERS = 4  # timed of each model
PARTS = ("attention's projections", "attention", "q/k norm and rope", "MLP", "head", "rest")


def parts(family: Family, work: Work, total: float, effort: Effort) -> dict[str, float]:
    """The shares of a patched model's time.

    A part is what the model becomes faster by without it. Attention itself, q/k norm and rope are timed
    alone, and attention's projections are what remains of the attention block.
    """
    headless = family.without(NO_HEAD)
    count = min(LAYERS, family.layers)
    models = {
        "all": headless.model(count, True, work.trains),
        "no MLP": headless.without(NO_MLP).model(count, True, work.trains),
        "no attention": headless.without(NO_ATTENTION).model(count, True, work.trains),
        "head": family.model(1, True, work.trains),
        "no head": headless.model(1, True, work.trains),
    }
    calls = {name: work.prepare(model, work.tokens) for name, model in models.items()}
    calls |= {name: _call(*of, work.trains) for name, of in _alone(headless, work).items()}
    for call in calls.values():
        call()
    seconds = quickest(calls, effort)

    def of_layers(without: str) -> float:
        return max(0.0, seconds["all"] - seconds[without]) * family.layers / count

    times = family.layers * (work.tokens if work.decodes else 1)
    attention, norms = (times * seconds[name] for name in ("attention", "q/k norm and rope"))
    found = {
        "attention's projections": max(0.0, of_layers("no attention") - attention - norms),
        "attention": attention,
        "q/k norm and rope": norms,
        "MLP": of_layers("no MLP"),
        "head": max(0.0, seconds["head"] - seconds["no head"]),
    }
    found["rest"] = max(0.0, total - sum(found.values()))
    return {part: found[part] / total for part in PARTS}


def layer_seconds(family: Family, work: Work, effort: Effort) -> dict[str, float]:
    """Of one layer of a patched model, for one token if it decodes, with our attention and with MLX's."""
    headless, counts = family.without(NO_HEAD), (1, 3)
    ways = {"ours": {}, "MLX's": {"attention": False}}
    calls = {
        (whose, count): work.prepare(headless.model(count, True, work.trains, **options), work.tokens)
        for whose, options in ways.items()
        for count in counts
    }
    for call in calls.values():
        call()
    seconds = quickest(calls, effort)
    few, many = counts
    calls_of_one = (many - few) * (work.tokens if work.decodes else 1)
    return {whose: (seconds[whose, many] - seconds[whose, few]) / calls_of_one for whose in ways}


def _alone(family: Family, work: Work) -> dict[str, tuple[Callable, Sequence[mx.array]]]:
    """What is between the projections of an attention block: functions, and their operands."""
    block, args = family.model(1, patched=True).layers[0].self_attn, family.config
    heads, kv_heads = args["num_attention_heads"], args["num_key_value_heads"]
    rows, keys_length = (1, CONTEXT + 1) if work.decodes else (work.tokens, work.tokens)

    def draw(*shape: int) -> mx.array:
        return mx.random.normal((1, *shape, args["head_dim"])).astype(family.dtype)

    def attention(q: mx.array, k: mx.array, v: mx.array) -> mx.array:
        mask = None if work.decodes else "causal"
        return mlx_fused.fused_attention(q, k, v, scale=block.scale, mask=mask)

    def norms(q: mx.array, k: mx.array) -> mx.array:
        if hasattr(block, "q_norm"):
            q, k = block.q_norm(q), block.k_norm(k)
        return [block.rope(a.transpose(0, 2, 1, 3)) for a in (q, k)]

    qkv = draw(heads, rows), draw(kv_heads, keys_length), draw(kv_heads, keys_length)
    flat = draw(rows, heads), draw(rows, kv_heads)
    return {"attention": (attention, qkv), "q/k norm and rope": (norms, flat)}


def _call(function: Callable, operands: Sequence[mx.array], trains: bool) -> Callable[[], None]:
    """With the gradients of all operands if it trains."""

    def loss(*operands: mx.array) -> mx.array:
        results = function(*operands)
        return sum(r.sum() for r in (results if isinstance(results, list) else [results]))

    mx.eval(operands)
    indices = tuple(range(len(operands)))
    run = mx.compile(mx.value_and_grad(loss, argnums=indices)) if trains else function

    def call() -> None:
        mx.eval(run(*operands))
        mx.synchronize()

    return call


def graph_building(config: Config, effort: Effort, layers: int = 16) -> dict[str, float]:
    """Microseconds to make, and to drop, the graph of one layer in decode, stock and patched."""
    small = {"hidden_size": 2 * GROUP_SIZE, "num_attention_heads": 2, "num_key_value_heads": 1}
    family = Family(config | small | NO_HEAD | NO_MLP, "bfloat16")  # sizes do not matter
    calls = {
        (who, count): _build(family.model(count, who == "patched"))
        for who in ("stock", "patched")
        for count in (1, layers + 1)
    }
    for call in calls.values():
        call()
    seconds = quickest(calls, effort)
    return {who: (seconds[who, layers + 1] - seconds[who, 1]) / layers * 1e6 for who in ("stock", "patched")}


def _build(model: nn.Module) -> Callable[[], None]:
    token, cache = mx.ones((1, 1), mx.int32), make_prompt_cache(model)
    mx.eval(model(token, cache=cache), [layer.state for layer in cache])
    before = [(layer.keys, layer.values) for layer in cache]

    def call() -> None:
        model(token, cache=cache)
        for layer, (keys, values) in zip(cache, before, strict=True):
            layer.keys, layer.values = keys, values  # or the graph would grow from call to call
            layer.trim(1)

    return call
