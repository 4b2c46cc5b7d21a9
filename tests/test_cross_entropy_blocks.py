"""The loss of a head's logits as GPUs make it, by blocks in MLX's operations; here on the CPU."""

import threading

import mlx.core as mx
import numpy as np
import pytest

import oracle
import test_cross_entropy
import test_cross_entropy_transforms
from cross_entropy import Loss, by_blocks, check, make
from graph import primitives
from mlx_fused import fused_linear_cross_entropy
from operands import normal
from test_cross_entropy import dtypes, options
from test_kinds import FORMS, named
from test_memory import nbytes, peak

ROWS, WORDS = 16, 64  # of a block


@pytest.fixture(autouse=True)
def blocks():
    with by_blocks(ROWS, WORDS):
        yield


@pytest.fixture
def many():
    return 3 * ROWS, 3 * WORDS


# What holds on the CPU holds of blocks.
for _of, _names in (
    (
        test_cross_entropy,
        "rows any_of_the_gradients layouts any_axes tied_embeddings reductions of_nothing "
        "targets_of_every_integer_dtype what_is_not_finite_stays_in_its_row infinite_logits large_logits "
        "a_certain_target_has_an_exact_gradient operands_of_several_dtypes errors "
        "an_index_that_the_targets_cannot_hold_ignores_none a_quantized_weight_has_no_gradient in_threads",
    ),
    (
        test_cross_entropy_transforms,
        "transforms_are_those_of_the_composed_form transforms_of_a_quantized_head "
        "a_mapped_gradient_of_a_frozen_quantized_head the_targets_may_be_mapped "
        "the_gradient_of_a_frozen_head_however_it_comes_about",
    ),
):
    for _name in _names.split():
        globals()[f"test_{_name}"] = getattr(_of, f"test_{_name}")


@dtypes
@options
def test_blocks_of_rows_and_words(rng, options, dtype):
    """Of fewer rows than a block has there are more words."""
    for rows, words in ((15, 66), (16, 64), (17, 65), (16, 129), (70, 300), (2, 1100)):
        check(rng, make(rng, (1, rows), 6, words, dtype=dtype, **options))


@pytest.mark.parametrize("form", [None, *FORMS], ids=lambda f: named(f))
def test_quantized_heads_and_adapters(rng, form):
    for rank in (None, 4):
        for dtype in (mx.float32, mx.bfloat16):
            check(rng, make(rng, (1, 20), 128, 140, form, dtype, rank=rank, masked="mask"))


def test_a_target_that_is_no_word(rng):
    """Its loss is NaN, and its row's gradient that of a row without a target."""
    loss = make(rng, (1, 30), 16, 150)
    weight, bias = (loss.head.leaves[name, None] for name in ("weight", "bias"))
    targets = mx.array(loss.targets)
    for target in (-1, 150, 2**40):
        targets[0, 2] = target
        wrong = Loss(loss.head, targets)
        losses = wrong()
        assert mx.isnan(losses[0, 2]) and mx.isnan(losses).sum() == 1
        expected = mx.softmax(loss.head.x[0, 2] @ weight.T + bias) @ weight
        for keys in (loss.head.trainable, [("x", None)]):
            dx = wrong.gradients(mx.ones((1, 30)), keys)[0]
            assert float(mx.abs(dx[0, 2] - expected).max()) < 2.0**-16


def test_words_at_minus_infinity(rng):
    """Also where the first blocks hold no others."""
    loss = make(rng, (1, 40), 16, 400)
    bias = mx.array(loss.head.leaves["bias", None])
    bias[:200] = -mx.inf
    low = Loss(loss.with_head(bias=bias).head, mx.arange(200, 240)[None])
    test_cross_entropy.check_same_as_composed(low, normal(rng, (1, 40)))


class Step:
    """The loss and gradients of a head of so many tokens and words."""

    hidden = 16

    def __init__(self, tokens, words):
        rng = np.random.default_rng(0)
        self.x, self.weight = (normal(rng, (n, self.hidden)) for n in (tokens, words))
        self.targets = mx.array(rng.integers(0, words, tokens))
        mx.eval(self.x, self.weight, self.targets)

    def loss(self, x, weight):
        return fused_linear_cross_entropy(x, weight, self.targets, reduction="sum")


@pytest.mark.parametrize("argnums", [0, (0, 1)], ids=["frozen", "trained"])
@pytest.mark.parametrize("transform", [lambda f: f, mx.compile], ids=["eager", "compiled"])
def test_memory_is_that_of_some_blocks(argnums, transform):
    """So many as MLX prepares ahead. Gradients are there twice while their parts are put together."""
    block = 4 * 256 * 512
    for tokens, words in ((256, 2**14), (256, 2**15), (512, 2**15)):
        head = Step(tokens, words)
        step = transform(mx.value_and_grad(head.loss, argnums))
        with by_blocks(256, 512):
            held = peak(lambda step=step, head=head: step(head.x, head.weight), [])
        grads = nbytes([head.x] if argnums == 0 else [head.x, head.weight])
        assert held < 9 * block + 2 * grads
    assert 9 * block < tokens * words * 4 / 14


def test_a_frozen_head_makes_its_logits_once(rng):
    loss = make(rng, (2, 8), 12, 40)
    for wanted, products in (([("x", None)], 2), ([("x", None), ("weight", None)], 4)):
        made = primitives(*loss.gradients(mx.ones((2, 8)), wanted))
        assert made["Matmul"] + made["AddMM"] == products, made


VIEWS = {"ExpandDims", "Squeeze", "Flatten", "Unflatten", "Slice", "Transpose", "After"}


def test_operations_of_a_block():
    """Thirteen in a compiled step of a frozen head: docs/design/cross_entropy.md counts with them."""
    counts = []
    for words in (2 * 4096, 3 * 4096):
        head = Step(256, words)

        def step(x, weight, targets):
            return mx.value_and_grad(fused_linear_cross_entropy)(x, weight, targets, reduction="sum")

        with by_blocks(256, 4096):
            counts.append(primitives(*mx.compile(step)(head.x, head.weight, head.targets)))
    more = counts[1] - counts[0]
    assert sum(count for name, count in more.items() if name not in VIEWS) == 13, more


def test_many_blocks_in_a_thread_with_little_stack():
    """A main thread has 8 MB. MLX frees a compiled function's graph, and looks for gradients, recursively."""
    head, results = Step(1024, 2**16), []  # 1024 blocks, as of 8192 tokens and 131,072 words

    def run():
        step = mx.compile(mx.value_and_grad(head.loss))
        with by_blocks(128, 512), mx.stream(mx.new_stream(mx.cpu)):
            results.extend(oracle.leaves(step(head.x, head.weight)))
            mx.eval(results)

    threading.stack_size(2**21)
    try:
        thread = threading.Thread(target=run)
        thread.start()
        thread.join()
    finally:
        threading.stack_size(0)
    assert len(results) == 2
