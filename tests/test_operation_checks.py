"""The checks of single operations: what is right passes, whatever its kind, and what is not is found."""

from itertools import cycle

import mlx.core as mx
import numpy as np
import pytest

import attention
import mlx_fused
import operands
import oracle
import projections
import quantized
import sabotage
from mlx_fused.validate import bounds, formulas, operations
from mlx_fused.validate.operations import Finding, OperationChecks, exact, read

HEADS = (4, 2, 64)
BASES = [None, ("affine", 32, 4), ("affine", 64, 8), ("affine", 32, 2), *quantized.FLOATS]
bases = pytest.mark.parametrize("form", BASES, ids=lambda f: "-".join(map(str, f)) if f else "dense")
dtypes = pytest.mark.parametrize("dtype", operands.DTYPES, ids=str)


def calls(rng, form, dtype, seq=9, **options):
    """As patched models make them: of attention's operations, without adapters and with them."""
    for ranks, rank in ((None, None), ((8, None, 3), 8)):
        qkv = projections.qkv(rng, 1, seq, 128, HEADS, form, dtype, ranks=ranks, **options)
        yield qkv.replace(split_heads=False)
        yield projections.output(rng, 1, seq, 128, 160, form, dtype, rank=rank, alpha=0.75, **options)


def activated(rng, form, dtype, seq=9):
    """Every activation, each with another packing or adapters."""
    ways = cycle([(None, None), ("gate_up", None), (None, (8, 3)), ("up_gate", (4,)), ("interleaved", None)])
    for activation, (packing, ranks) in zip(projections.ACTIVATIONS, ways, strict=False):
        options = {"activation": activation, "packing": packing, "ranks": ranks}
        yield projections.gated(rng, 1, seq, 128, 96, form, dtype, **options)
        if activation in oracle.PARTS:
            rank = ranks and ranks[0]
            yield projections.linear(rng, 1, seq, 128, 96, form, dtype, activation=activation, rank=rank)


def check(call, outputs=None, sabotaged=None, **options):
    """The findings, part by part, with ``outputs`` in place of what the operation gives."""
    checks = OperationChecks({id(call): "layer"})
    operation, arguments = getattr(mlx_fused, call.operation), call.keywords | options
    if sabotaged:
        right, (target, factor) = operation, sabotaged

        def operation(**arguments):
            return sabotage.sabotaged(right, arguments, target, factor)

    checks(call, operation, arguments, operation(**arguments) if outputs is None else outputs)
    assert checks.count == 1
    return checks.findings


def verdicts(findings):
    return {finding.verdict for of in findings.values() for finding in of.values()}


def largest(findings):
    return max(finding.share for of in findings.values() for finding in of.values())


@dtypes
@bases
def test_what_is_right_passes(rng, form, dtype):
    for seq in (1, 9, 40):
        for call in calls(rng, form, dtype, seq):
            findings = check(call)
            assert largest(findings) < 0.5
            assert "failed" not in verdicts(findings)
            if seq == 40 and "lora_a" not in call.arguments:  # beside these adapters a bias is little
                assert verdicts(findings) == {"passed"}


@dtypes
@bases
def test_activations_that_are_right_pass(rng, form, dtype):
    for seq in (1, 40):
        for call in activated(rng, form, dtype, seq):
            findings = check(call)
            assert largest(findings) < 0.5 and "failed" not in verdicts(findings)
            if seq == 40 and "lora_a" not in call.arguments:
                assert {f.verdict for f in findings["their components"].values()} == {"passed"}


@dtypes
def test_norms_that_are_right_pass(rng, dtype):
    weight = (1 + 0.1 * mx.random.normal((128,), key=mx.random.key(0))).astype(dtype)
    for seq in (1, 40):
        every = [call for call in (*calls(rng, None, dtype, seq), *activated(rng, None, dtype, seq))]
        for call in every:
            if "residual" not in call.arguments:
                for norm in ((weight, 1e-5), (None, 1e-2)):
                    findings = check(call, norm=norm)
                    assert largest(findings) < 0.5 and "failed" not in verdicts(findings)
                    assert ("norm" in findings["gradients"]) == (norm[0] is not None)


@pytest.mark.parametrize(
    ("packing", "activation", "adapted"),
    [(None, activation, False) for activation in projections.ACTIVATIONS]
    + [(None, "silu", True), ("gate_up", "gelu", False), ("up_gate", "silu", True)]
    + [("interleaved", "clipped_swiglu", False)],
)
def test_what_is_wrong_in_a_gate_or_a_norm_is_found(rng, packing, activation, adapted):
    """Every operand and every gradient, as in models (see ``sabotage``), where no model has these."""
    ranks = (8, 8) if adapted else None
    call = projections.gated(
        rng, 1, 40, 64, 96, activation=activation, packing=packing, ranks=ranks, scale=0.1
    )
    call = call.replace(norm=(1 + 0.1 * mx.random.normal((64,), key=mx.random.key(0)), 1e-5))
    targets = list(sabotage.targets_of(call.keywords))
    assert len(targets) == (8 if packing else 13) + adapted * (5 if packing else 10)
    for target in targets:
        for factor in (1.0, 1.01):
            verdict = verdicts(check(call, sabotaged=(target, factor)))
            assert ("failed" in verdict) == (factor != 1), target


@dtypes
@bases
def test_formulas_are_those_of_the_tests(rng, form, dtype):
    arithmetic = formulas.Arithmetic()
    for call in (*calls(rng, form, dtype), *activated(rng, form, dtype)):
        read_call = read(call.keywords, False)
        if not call.packed:
            for segment, terms in zip(read_call.segments, call.exact_operands[1], strict=True):
                np.testing.assert_array_equal(segment.magnitude, np.abs(terms).sum(0))
        found = formulas.outputs(read_call, arithmetic)
        plain = call.replace(split_heads=True) if call.segments else call
        expected = plain.formula(*call.exact_operands)
        for e, y in zip(expected, found.values(), strict=True):
            by_row = e.transpose(0, 2, 1, 3).reshape(9, -1) if call.segments else e.reshape(9, -1)
            np.testing.assert_allclose(y.value, by_row, rtol=1e-12, atol=1e-12)
        given = projections.cotangents(rng, call)
        keys = call.trainable
        expected = call.gradient_formula(keys)(oracle.exact(given), *call.exact_operands)
        if call.segments:
            given = [g.transpose(0, 2, 1, 3).reshape(1, 9, -1) for g in given]
        grads = formulas.segment_gradients(read_call, [exact(g)[0] for g in given], arithmetic)
        by_name = {key: e.value for key, e in formulas.gradients(read_call, grads, arithmetic)}
        for (name, place), e in zip(keys, expected, strict=True):
            if name != "residual":
                shared = name in ("input", "x")
                key = ("input", "") if shared else (name, read_call.segments[place or 0].name)
                np.testing.assert_allclose(
                    by_name[key], e.reshape(by_name[key].shape), rtol=1e-12, atol=1e-12
                )


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16], ids=str)
@bases
def test_the_composed_form_passes_with_its_own_roundings(rng, form, dtype, monkeypatch):
    monkeypatch.setenv("MLX_FUSED_ROUTE", "composed")
    for call in (*calls(rng, form, dtype, 40), *activated(rng, form, dtype, 40)):
        assert "failed" not in verdicts(check(call))


def test_the_roundings_of_the_composed_form_are_no_excuse_for_a_kernel(rng, monkeypatch):
    """Nor is what MLX's 16-bit quantized_matmul does."""
    kernel = formulas.Arithmetic()
    for call in calls(rng, ("affine", 32, 4), mx.bfloat16, 40):
        composed = getattr(mlx_fused, call.operation)(**call.keywords, route="composed")
        mx.eval(composed)
        with monkeypatch.context() as patch:
            patch.setattr(operations, "_arithmetic", lambda *_: kernel)
            assert "failed" in verdicts(check(call, composed))


@dtypes
def test_numbers_that_are_not_finite(rng, dtype):
    for call in calls(rng, None, dtype):
        name = call.input_name
        x = mx.array(call.x)
        x[0, 3, 5] = float("nan")
        x[0, 4, 5] = float("inf")
        assert "failed" not in verdicts(check(call.replace(**{name: x})))
        y = getattr(mlx_fused, call.operation)(**call.keywords)
        y = list(y) if call.segments else [y]
        y[-1] = mx.where(mx.arange(y[-1].shape[-1]) == 3, float("nan"), y[-1]).astype(dtype)
        assert "failed" in verdicts(check(call, y))


def test_float16_overflows_where_the_exact_result_does(rng):
    for call in calls(rng, None, mx.float16, 40):
        name = call.input_name
        large = call.replace(**{name: 3000 * call.x})
        outputs = getattr(mlx_fused, call.operation)(**large.keywords)
        outputs = list(outputs) if call.segments else [outputs]
        assert any(mx.isinf(y).any() for y in outputs)
        assert check(large)["results"]["q" if call.segments else "o"].verdict == "passed"
        outputs[0] = mx.where(mx.isinf(outputs[0]), 65504.0, outputs[0]).astype(mx.float16)
        assert "failed" in verdicts(check(large, outputs))


def test_a_small_part_is_found_where_no_number_shows_it(rng):
    """The error of the sums of a wide layer covers 1 % of a bias in each number, but not in all of them."""
    hidden, features = 4096, 64
    x = mx.array(rng.normal(0, 1, (1, 60, hidden))).astype(mx.bfloat16)
    weight, bias = (
        mx.array(rng.normal(0, spread, shape)).astype(mx.bfloat16)
        for spread, shape in ((1 / 64, (features, hidden)), (0.08, (features,)))
    )
    operand, exact_bias = oracle.exact(weight), oracle.exact(bias)
    segment = formulas.Segment("o", operand, np.abs(operand), exact_bias, None, None, 1.0)
    call = formulas.Call(oracle.exact(x)[0], (segment,))
    expected = formulas.outputs(call, formulas.Arithmetic())["o"]
    right = call.x @ operand.T + exact_bias
    for factor, found in ((0.0, False), (0.01, True)):
        y = oracle.rounded(right + factor * exact_bias, mx.bfloat16)
        compared = bounds.compare(y, mx.bfloat16, expected, formulas.Arithmetic())
        assert compared.share <= 1
        assert (compared.components["bias"].share > 1) == found
        assert compared.components["projection"].share <= 1


@dtypes
@bases
def test_what_is_called_noticeable_is_noticed(rng, form, dtype):
    for seq in (1, 9):
        for call in calls(rng, form, dtype, seq):
            for expected in formulas.outputs(read(call.keywords, False), formulas.Arithmetic()).values():
                value = sum(expected.components.values())
                right = bounds.compare(oracle.rounded(value, dtype), dtype, expected, formulas.Arithmetic())
                for name, component in expected.components.items():
                    wrong = oracle.rounded(value + 0.01 * component, dtype)
                    found = bounds.compare(wrong, dtype, expected, formulas.Arithmetic())
                    worst = max(found.share, *(c.share for c in found.components.values()))
                    assert worst > 1 or not right.components[name].noticeable


def test_an_adapter_that_does_nothing_is_not_judged(rng):
    (call,) = (c for c in calls(rng, None, mx.bfloat16) if c.segments and "lora_a" in c.arguments)
    b = tuple(None if b is None else mx.zeros_like(b) for b in call.arguments["lora_b"])
    findings = check(call.replace(lora_b=b))
    assert not any("adapter" in kind for kind in findings["their components"])
    assert verdicts(findings) == {"passed"}


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16], ids=str)
def test_what_is_swallowed_by_rounding_is_inconclusive_and_no_error(rng, dtype):
    """A projection below half a step of the residual and in its direction: no error of it cancels out."""
    residual = (1 + mx.random.uniform(0, 0.9, (1, 40, 64), key=mx.random.key(0))).astype(dtype)
    weight = (1e-5 * mx.eye(64)).astype(dtype)
    arguments = {"x": residual, "weight": weight, "bias": None, "residual": residual}
    call = projections.Call("fused_output_projection_residual", arguments)
    findings = check(call)
    assert findings["their components"]["projection in o"].verdict == "inconclusive"
    assert findings["their components"]["residual in o"].verdict == "passed"
    assert "failed" not in verdicts(findings)


@pytest.mark.parametrize("scale", [1e-6, 1e-8, 1e-10, 1e-15])
def test_how_ties_are_rounded_is_no_error_of_what_sums_swallow(rng, scale):
    """Bias and residual often add up to a tie; the projection decides it, or is lost in the sum."""
    values = (rng.normal(0, 1, shape) for shape in ((1, 40, 256), (256, 256), (256,), (1, 40, 256)))
    x, weight, bias, residual = (mx.array(v).astype(mx.bfloat16) for v in values)
    weight = (scale * weight).astype(mx.bfloat16)
    arguments = {"x": x, "weight": weight, "bias": bias, "residual": residual}
    for options in ({}, {"route": "composed"}):
        findings = check(projections.Call("fused_output_projection_residual", arguments), **options)
        assert "failed" not in verdicts(findings)


def test_equal_rows_count_once(rng, monkeypatch):
    """Their errors are equal and do not cancel out, though each number is within its bound."""
    monkeypatch.setattr(operations, "_arithmetic", lambda *_: formulas.Arithmetic())
    for call in calls(rng, None, mx.bfloat16, 200):
        name = call.input_name
        names = {name, "residual"} & call.arguments.keys()
        same = call.replace(**{n: mx.repeat(call.arguments[n][:, :1], 200, 1) for n in names})
        outputs = []
        for expected in formulas.outputs(read(same.keywords, False), formulas.Arithmetic()).values():
            value = sum(expected.components.values())
            # What decides how a number is rounded is off as far as it may be, always outwards.
            off = 7 * np.sqrt(expected.terms) * 2.0**-24 * expected.magnitude
            y = oracle.rounded(value + np.sign(value) * off, mx.bfloat16)
            outputs.append(mx.array(y[None], dtype=mx.float64).astype(mx.bfloat16, stream=mx.cpu))
        findings = check(same, outputs)
        assert "failed" not in verdicts(findings)
        assert largest(findings) > 0.5


def test_the_errors_of_a_low_rank_product_are_those_of_many_numbers(rng):
    """Each number of x A errs by no more than it may, and so do all the numbers made of it, together."""
    rows, width, wide = 40, 64, 4096
    x, a, b = rng.normal(0, 1, (rows, width)), rng.normal(0, 1, (width, 1)), rng.normal(0, 1, (1, wide))
    signs = rng.choice([-1.0, 1.0], (rows, 1))

    def off(left, right):
        return left @ right + 2 * signs * np.sqrt(width) * 2.0**-24 * (np.abs(left) @ np.abs(right))

    arithmetic = formulas.Arithmetic()
    segment = formulas.Segment("o", *(np.full((wide, width), 1e-9) for _ in range(2)), None, a, b, 1.0)
    results = [(off(x, a) @ b, formulas.outputs(formulas.Call(x, (segment,)), arithmetic)["o"])]
    # The other way round: dy B^T is narrow, and dx as wide as A is tall.
    segment = formulas.Segment("o", *(np.full((width, wide), 1e-9) for _ in range(2)), None, b.T, a.T, 1.0)
    call = formulas.Call(np.zeros((rows, wide)), (segment,))
    grads = formulas.segment_gradients(call, [x], arithmetic)
    dx = dict(formulas.gradients(call, grads, arithmetic))["input", ""]
    results.append((off(x, a) @ b, dx))
    for actual, expected in results:
        actual = actual + next(iter(expected.components.values()))  # the projection, which is next to nothing
        compared = bounds.compare(actual, mx.float32, expected, arithmetic)
        assert compared.share <= 1 and max(c.share for c in compared.components.values()) <= 1
        expected.shared.clear()
        compared = bounds.compare(actual, mx.float32, expected, arithmetic)
        assert max(c.share for c in compared.components.values()) > 1


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16], ids=str)
def test_weights_rounded_in_tiles_are_allowed_for_where_there_are_tiles(rng, dtype):
    """What Metal's tiles hold, computed here."""
    tiles = formulas.Arithmetic(weight_unit=bounds.DTYPES[dtype].unit)
    shares = {tiles: [], formulas.Arithmetic(): []}
    for call in calls(rng, ("affine", 32, 4), dtype, 40):
        outputs = call.formula(*quantized.in_tiles(call.exact_operands, dtype))
        if call.segments:
            outputs = [y.transpose(0, 2, 1, 3) for y in outputs]
        outputs = [oracle.rounded(y.reshape(40, -1), dtype) for y in outputs]
        for arithmetic, found in shares.items():
            expected = formulas.outputs(read(call.keywords, False), arithmetic).values()
            for y, e in zip(outputs, expected, strict=True):
                compared = bounds.compare(y, dtype, e, arithmetic)
                found += [compared.share, *(c.share for c in compared.components.values())]
    assert max(shares[tiles]) <= 1 < max(shares[formulas.Arithmetic()])


@dtypes
def test_rounding_is_to_the_nearest(rng, dtype):
    values = np.concatenate([rng.normal(0, 1, 1000), 2.0 ** np.arange(-20, 10), rng.normal(0, 1e-6, 1000)])
    values = np.concatenate([values, np.float64([1 + 2.0**-8, 1 + 3 * 2.0**-8, 0.0])])  # ties of bfloat16
    kind, rounded = bounds.DTYPES[dtype], oracle.rounded(values, dtype)
    np.testing.assert_array_equal(kind.round(values), rounded)
    assert (kind.beyond_rounding(rounded, values) == 0).all()
    assert (kind.beyond_rounding(rounded, rounded + 2 * kind.step(rounded)) > 0).all()
    # Below a power of two the next number is nearer than above.
    assert kind.beyond_rounding(np.ones(1), np.array([1 - 0.75 * kind.unit])) == kind.unit / 4
    assert kind.beyond_rounding(np.ones(1), np.array([1 + 0.75 * kind.unit])) == 0


def test_a_finding_keeps_the_worst():
    finding = Finding()
    for share, layer in ((0.2, "a"), (0.7, "b"), (0.5, "c")):
        finding.add(share, layer, layer != "c")
    assert (finding.share, finding.layer, finding.verdict) == (0.7, "b", "inconclusive")
    finding.add(0.1, "c", True)  # another call of the layer, which could tell
    assert finding.verdict == "passed"
    finding.add(float("nan"), "d", True)
    finding.add(0.9, "e", True)
    assert finding.layer == "d" and finding.verdict == "failed"


MASKS = ["none", "causal", "boolean", "added", "padding", "holes"]


def attentions(rng, dtype, has_sinks):
    for mask in MASKS:
        for lengths in ((1, 30), (24, 24), (5, 40), (24, 9)):
            yield attention.make(rng, 2, (4, 2, 32, 24), lengths, mask, dtype, has_sinks)


def check_attention(call, operation=mlx_fused.fused_attention):
    checks = OperationChecks({id(call): "layer"})
    arguments = {name: getattr(call, name) for name in ("q", "k", "v", "scale", "mask", "sinks")}
    checks(call, operation, arguments, operation(**arguments))
    return checks.findings


@dtypes
@pytest.mark.parametrize("has_sinks", [False, True])
def test_attention_that_is_right_passes(rng, dtype, has_sinks):
    for call in attentions(rng, dtype, has_sinks):
        findings = check_attention(call)
        assert largest(findings) < 0.5 and "failed" not in verdicts(findings)
        if dtype != mx.bfloat16:  # whose factors may be rounded, which hides much in so few numbers
            assert verdicts(findings) == {"passed"}
        assert findings["gradients"].keys() == {"q", "k", "v"} | ({"sinks"} if has_sinks else set())


@dtypes
@pytest.mark.parametrize("operand", ["q", "k", "v", "scale", "sinks", "mask"])
def test_what_is_wrong_in_attention_is_found(rng, dtype, operand):
    def wrong(**arguments):
        value = arguments[operand]
        if operand == "mask":  # a key too many
            value = mx.concatenate([value[..., 1:], value[..., :1]], -1)
        else:
            value = 1.01 * (value.astype(mx.float32) if isinstance(value, mx.array) else value)
        wide = {name: arguments[name].astype(mx.float32) for name in "qkv"}
        y = mlx_fused.fused_attention(**arguments | wide | {operand: value})
        return y.astype(arguments["q"].dtype)  # which the operation would not give otherwise

    mask = "boolean" if operand == "mask" else "causal"
    call = attention.make(rng, 2, (4, 2, 32, 24), (24, 24), mask, dtype, has_sinks=True)
    assert "failed" in verdicts(check_attention(call, wrong))
