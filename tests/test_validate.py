"""Validation of checkpoints: what passes, and what must not."""

import json
import math
import os
import shutil
import subprocess
import sys
from copy import deepcopy

import mlx.core as mx
import mlx.nn as nn
import mlx_lm
import pytest
from click.testing import CliRunner
from mlx.utils import tree_flatten, tree_map
from mlx_lm.convert import convert
from mlx_lm.tuner.utils import linear_to_lora_layers

import mlx_fused
import sabotage
import tiny_demo
import tiny_models
from mlx_fused import losses, validate
from mlx_fused.cli import main
from mlx_fused.patching import attention, projections
from mlx_fused.validate import checkpoint, end_to_end
from zoo import configs as zoo

PROMPT = list(range(5, 45))


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoints")
    tiny_demo.make(folder)
    convert(str(folder / "model"), str(folder / "model-bf16"), dtype="bfloat16")
    return folder


@pytest.fixture
def wrong_values(monkeypatch):
    """Makes all values of the patched model wrong in a way that the test gives."""

    def install(function):
        correct = projections.Operation.__call__

        def run(operation, *given):
            outputs = correct(operation, *given)
            is_qkv = operation.function is mlx_fused.fused_qkv_projection
            return [*outputs[:2], function(outputs[2])] if is_qkv else outputs

        monkeypatch.setattr(projections.Operation, "__call__", run)

    return install


def run(*arguments):
    return CliRunner().invoke(main, ["validate", *map(str, arguments)])


def check(model, tokens=4):
    return validate.validate(model, PROMPT, tokens)


def test_adapters_with_dropout_are_compared_under_the_same(checkpoints, tmp_path, wrong_values):
    shutil.copytree(checkpoints / "adapters", tmp_path / "adapters")
    file = tmp_path / "adapters" / "adapter_config.json"
    config = json.loads(file.read_text())
    config["lora_parameters"]["dropout"] = 0.3
    file.write_text(json.dumps(config))
    arguments = [checkpoints / "model-4bit", "--adapter-path", tmp_path / "adapters", "--json"]
    result = run(*arguments)
    assert result.exit_code == 0, result.output
    gradients = json.loads(result.stdout)["end_to_end"]["float32"]["gradients"].values()
    assert all(line["stock_error"] == 0 and line["patched_error"] < 1e-4 for line in gradients)
    wrong_values(lambda v: 1.01 * v)
    assert run(*arguments).exit_code == 1


def test_4_bit_weights_under_bfloat16_activations_pass(checkpoints, tmp_path):
    options = {"quantize": True, "q_group_size": 32, "q_bits": 4}
    convert(str(checkpoints / "model"), str(tmp_path / "model"), dtype="bfloat16", **options)
    result = run(tmp_path / "model", "--json")
    assert result.exit_code == 0, result.output
    results = json.loads(result.stdout)
    assert results["dtype"] == "bfloat16" and results["calls"]["qkv"]["fused"] > 0


def test_a_switch_that_is_off_is_to_blame_not_the_model(checkpoints, monkeypatch):
    monkeypatch.setenv("MLX_FUSED", "0")
    result = run(checkpoints / "model")
    assert result.exit_code == 2
    assert "MLX_FUSED must be unset or on for validate but is '0'." in result.output
    assert "MODEL:" not in result.output


def test_the_switch_is_blamed_only_where_it_is_off(checkpoints, monkeypatch):
    monkeypatch.setattr(projections, "DTYPES", frozenset())
    monkeypatch.setattr(attention, "has_kernels", lambda x: False)
    monkeypatch.setattr(losses, "head_of", lambda logits: "a reason")  # which takes MLX's products too
    result = run(checkpoints / "model")
    assert result.exit_code == 2
    assert "Nothing of it ran fused" in result.output and "MLX_FUSED" not in result.output


def test_a_damaged_checkpoint_is_not_validated(checkpoints, tmp_path):
    shutil.copytree(checkpoints / "model", tmp_path / "model")
    with (tmp_path / "model" / "model.safetensors").open("r+b") as file:
        file.truncate(1000)
    result = run(tmp_path / "model")
    assert result.exit_code == 2 and "cannot be loaded" in result.output


@pytest.mark.parametrize(
    "arguments", [["model"], ["model-4bit"], ["model-4bit", "--adapter-path", "adapters"], ["model-bf16"]]
)
def test_checkpoints_of_the_demo_pass(checkpoints, arguments):
    paths = [a if a.startswith("--") else checkpoints / a for a in arguments]
    result = run(*paths, "--tokens", "8", "--json")
    assert result.exit_code == 0, result.output
    results = json.loads(result.stdout)
    assert results["passed"] and results["verdicts"]["failed"] == 0
    assert results["calls"]["qkv"]["fused"] == results["calls"]["qkv"]["total"] > 0
    assert results["calls"]["residual"]["fused"] == results["calls"]["residual"]["total"] > 0
    assert results["calls"]["loss"]["fused"] == results["calls"]["loss"]["total"] > 0
    layers = sum(not {"norm", "rope"} & set(parts) for parts in results["layers"].values())
    embedding = "model-4bit" in arguments  # quantized ones alone
    for operations in results["operations"].values():
        # QKV, attention, output, gate * up and down of both layers, and the head, for the prompt and a token
        # and one loss.
        assert layers == 5 + embedding and operations["count"] == 2 * (2 * 5 + 1) + 1
        assert set(operations["results"]) == {*"qkvoy", "gate * up", "attention", "loss"}
        findings = [f for part, of in operations.items() if part != "count" for f in of.values()]
        assert all(f["verdict"] == "passed" and f["share"] < 0.5 and f["noticeable"] == 1 for f in findings)
    float32 = results["end_to_end"]["float32"]
    # Every projection has an A and a B; the dense ones of a layer, and the head, have weights.
    assert len(float32["gradients"]) == 7 * 2 + (0 if "model-4bit" in arguments else 8)
    assert all(line["patched_error"] < line["tolerance"] for line in float32["gradients"].values())
    assert all(line["patched_error"] > 0 for name, line in float32["gradients"].items() if "lora" in name)
    assert float32["logits"]["stock_error"] == 0  # float32 is its own reference
    assert 0 < float32["logits"]["patched_error"] < float32["logits"]["tolerance"] < 1e-4
    for lines in results["end_to_end"].values():
        same = {"tokens": 8, "diverges_at": None, "verdict": "passed"}
        assert lines["greedy"] == {**lines["greedy"], **same}
    for of in (*results["tokens_per_second"].values(), *results["peak_memory"].values()):
        assert of["stock"] > 0 and of["patched"] > 0
    assert "Validating" not in result.stdout
    assert result.stderr.count("each line shows the worst of its checks; --json has them all") == 2
    assert "PASSED" in result.stderr and "…" not in result.stderr  # nothing is cut at 80 columns
    assert max(map(len, result.stderr.split("ran fused: ")[0].splitlines()[2:])) <= 80


def test_progress_ends_where_it_says(checkpoints):
    for name in ("model", "model-bf16"):
        model, _ = validate.load(str(checkpoints / name), None)
        seen = []
        validate.validate(model, PROMPT, 2, lambda done, of: seen.append((done, of)))  # noqa: B023
        assert [done for done, _ in seen] == list(range(1, len(seen) + 1))
        assert {of for _, of in seen} == {len(seen)}


@pytest.mark.parametrize("name", ["gemma3n", "afm7"])
def test_models_that_take_no_adapters_of_the_usual_kind(name):
    model = zoo.make(name)
    results = validate.validate(model, [7, 8, 9, 10, 11], 2)
    gradients = results["end_to_end"]["float32"]["gradients"].values()
    assert results["passed"] and any(line["patched_error"] > 0 for line in gradients)


@pytest.mark.parametrize("name", ["llama", "gemma3n"])
def test_the_same_model_gives_the_same_numbers(name):
    model = zoo.make(name)
    first, second = (validate.validate(m, [7, 8, 9, 10, 11], 2) for m in (deepcopy(model), model))
    assert first["end_to_end"] == second["end_to_end"] and first["operations"] == second["operations"]


@pytest.mark.parametrize("name", ["bitnet", "deepseek_v41", "recurrent_gemma"])
def test_what_fails_unpatched_is_not_validated(name):
    with pytest.raises(validate.CannotValidate, match="The model fails unpatched: "):
        validate.validate(zoo.make(name), [7, 8, 9, 10, 11], 2)


def test_sixteen_bits_are_held_to_the_stock_models_own_error(checkpoints):
    model, _ = validate.load(str(checkpoints / "model-bf16"), None)
    results = check(model)
    logits = results["end_to_end"]["bfloat16"]["logits"]
    assert results["passed"] and results["dtype"] == "bfloat16"
    assert 1e-4 < logits["stock_error"] < 1e-1
    assert logits["tolerance"] == 2 * logits["stock_error"]


def off(value):
    """An array at this distance from ones, as a share of their norm."""
    return mx.array([1 + value, 1 + value])


@pytest.mark.parametrize(
    ("stock", "patched", "verdict"),
    [
        (0.0, 1e-6, "passed"),
        (0.0, 1e-3, "failed"),
        (0.004, 0.0075, "passed"),
        (0.004, 0.0085, "failed"),
        (0.2, 0.009, "passed"),  # right, whatever the stock model is
        (0.2, 0.02, "inconclusive"),
        (0.2, 0.5, "failed"),
        (2.0, math.nan, "failed"),
        (math.nan, math.nan, "inconclusive"),
        (math.inf, 0.0, "inconclusive"),
    ],
)
def test_a_comparison_that_cannot_tell_says_so(stock, patched, verdict):
    assert end_to_end.line(off(stock), off(patched), off(0.0), 1e-5)["verdict"] == verdict


def test_gradients_of_16_bit_adapters_may_be_rounded_otherwise(checkpoints):
    ones = mx.ones(2, mx.bfloat16)
    assert end_to_end.line(ones, ones + 2.0**-7, ones, 1e-5)["verdict"] == "passed"
    assert end_to_end.line(ones, ones + 2.0**-6, ones, 1e-5)["verdict"] == "failed"


@pytest.mark.parametrize("name", ["model", "model-4bit", "model-bf16"])
def test_wrong_values_fail(checkpoints, wrong_values, name):
    wrong_values(lambda v: v * 1.01)
    result = run(checkpoints / name, "--tokens", "2")
    assert result.exit_code == 1
    assert "FAILED" in result.output


def test_nan_fails(checkpoints, wrong_values):
    wrong_values(lambda v: v * math.nan)
    result = run(checkpoints / "model", "--tokens", "2", "--json")
    assert result.exit_code == 1
    assert json.loads(result.stdout)["end_to_end"]["float32"]["logits"]["verdict"] == "failed"


def test_wrong_gradients_fail(checkpoints, wrong_values):
    wrong_values(lambda v: v + 0.01 * (v - mx.stop_gradient(v)))
    model, _ = validate.load(str(checkpoints / "model-4bit"), None)
    results = check(model)
    lines = results["end_to_end"]["float32"]
    assert lines["logits"]["verdict"] == lines["greedy"]["verdict"] == "passed"
    assert lines["gradients"]["model.layers.*.self_attn.v_proj.lora_a"]["verdict"] == "failed"
    assert not results["passed"]


@pytest.mark.parametrize(
    ("gap", "of_logits", "verdict"),
    [
        (0.5, "passed", "passed"),
        (0.5, "inconclusive", "inconclusive"),
        (2.0, "passed", "failed"),
        (math.nan, "passed", "failed"),
    ],
)
def test_other_tokens_pass_if_it_was_a_close_call(monkeypatch, gap, of_logits, verdict):
    class Model(nn.Module):
        def __call__(self, tokens):
            assert tokens.tolist() == [[7, 8, 0]]  # the prompt, and the token on which both agree
            return mx.array([[[9.0, 9.0, 9.0], [0.0, 0.0, 0.0], [0.0, 0.0, -gap]]])

    made = iter([[0, 1, 1], [0, 2, 0]] * 3)
    result = {"prefill_s": 1.0, "decode_s": 1.0}
    monkeypatch.setattr(end_to_end, "continue_greedily", lambda *_: {"tokens": next(made), **result})
    runs = end_to_end.Runs(Model(), lambda: None)
    logits = {"float32": {"tolerance": 1 / 8, "rms": 1.0, "verdict": of_logits}}
    lines, speed = end_to_end.generate(runs, mx.array([7, 8]), 3, logits)
    gap = pytest.approx(gap, nan_ok=True)
    expected = {"tokens": 3, "diverges_at": 1, "gap": gap, "tolerance": 1.0, "verdict": verdict}
    assert lines == {"float32": expected}
    assert speed["prefill"]["stock"] == 2 and speed["decode"]["patched"] == 2


@pytest.mark.parametrize("target", [("lora_a", "q"), ("lora_a", "o", "lora_a")], ids="-".join)
def test_adapters_as_training_starts_with_them_do_not_hide_mistakes(target):
    """Their B is zero, so neither A nor the gradient of A makes a difference."""
    model = sabotage.make("llama", "float32")
    keys = {f"self_attn.{name}_proj" for name in "qkvo"}
    linear_to_lora_layers(model, 2, {"rank": 4, "dropout": 0.0, "scale": 10.0, "keys": keys})
    assert check(deepcopy(model))["passed"]
    with sabotage.sabotage(sabotage.Target(*target), 5.0):
        assert not check(model)["passed"]


@pytest.mark.parametrize("weights", ["float32", "4-bit bfloat16"])
def test_parameters_without_gradients_fail(weights, monkeypatch):
    model = sabotage.make("llama", weights)
    assert check(deepcopy(model))["passed"]
    correct = projections.operands

    def operands(module):
        found = correct(module)
        bias = None if found.bias is None else mx.stop_gradient(found.bias)
        return found._replace(weight=mx.stop_gradient(found.weight), bias=bias)

    monkeypatch.setattr(projections, "operands", operands)
    with sabotage.wrapped(lambda operation: operation):
        results = check(model)
    gradients = results["end_to_end"]["float32"]["gradients"]
    failed = {name for name, line in gradients.items() if line["verdict"] == "failed"}
    layer, dense = "model.layers.*.self_attn", [] if "bit" in weights else ["weight"]
    kinds = {f"{layer}.{name}_proj.linear.{p}" for name in "qkvo" for p in dense}
    assert failed & kinds == kinds and f"{layer}.*.bias" in failed


@pytest.mark.parametrize("weights", ["float32", "4-bit bfloat16"])
def test_operands_that_are_remembered_fail(weights, monkeypatch):
    """They are right until a parameter changes, which nothing but a step of training does."""
    correct, remembered = projections.operands, {}

    def operands(module):
        kept = remembered.setdefault((id(module), type(module)), (correct(module), module))
        return kept[0]

    monkeypatch.setattr(projections, "operands", operands)
    with sabotage.wrapped(lambda operation: operation):
        results = check(sabotage.make("llama", weights))
    assert results["end_to_end"]["float32"]["logits_after_a_step"]["verdict"] == "failed"


def test_a_step_moves_logits_and_leaves_no_trace(checkpoints):
    model, _ = validate.load(str(checkpoints / "model-4bit"), checkpoints / "adapters")
    model.unfreeze(keys=["lora_a", "lora_b"])
    before = {name: p.tolist() for name, p in tree_flatten(model.trainable_parameters())}
    tokens = mx.array(PROMPT)
    found = end_to_end.training_step(model, tokens)
    assert end_to_end.error(found[end_to_end.AFTER_A_STEP][0], end_to_end.logits(model, tokens)) > 0.01
    after = {name: p.tolist() for name, p in tree_flatten(model.trainable_parameters())}
    assert after == before


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_model_whose_own_results_are_not_finite_is_not_validated(value):
    model = sabotage.make("llama", "bfloat16")
    model.model.layers[0].self_attn.q_proj.bias[3] = value
    with pytest.raises(validate.CannotValidate, match="own results are not finite"):
        check(model)


def test_overflow_of_the_models_own_type_is_inconclusive():
    model = sabotage.make("llama", "float32")
    model.set_dtype(mx.float16)
    model.model.norm.weight = 60000 * mx.sign(model.model.norm.weight)
    lines = check(model)["end_to_end"]
    assert lines["float32"]["logits"]["verdict"] == "passed"
    half = lines["float16"]
    of_gradients = {line["verdict"] for line in half["gradients"].values()}
    assert of_gradients == {"inconclusive"}
    assert half["logits"]["verdict"] == half["logits_after_a_step"]["verdict"] == "inconclusive"
    assert half["greedy"]["verdict"] != "failed"


def test_large_logits_are_finite_and_subnormal_ones_zero():
    ones = mx.ones(2)
    assert end_to_end.line(1e-40 * ones, 0 * ones, 1e-40 * ones, 1e-5)["verdict"] == "passed"
    assert end_to_end.line(1e30 * ones, 1.000001e30 * ones, 1e30 * ones, 1e-5)["verdict"] == "passed"
    assert end_to_end.line(1e30 * ones, 1.01e30 * ones, 1e30 * ones, 1e-5)["verdict"] == "failed"


@pytest.mark.parametrize("larger", [False, True])
def test_batches_are_checked_and_single_rows_too(larger):
    def wrap(operation):
        def run(**arguments):
            outputs = operation(**arguments)
            batch = next(arguments[name] for name in ("input", "x", "q") if name in arguments).shape[0]
            return tree_map(lambda y: 1.01 * y, outputs) if (batch > 1) == larger else outputs

        return run

    model = sabotage.make("llama", "float32")
    assert sabotage.passes(model)
    with sabotage.wrapped(wrap):
        assert not sabotage.passes(model)


def test_model_is_left_unpatched_and_in_its_own_classes(checkpoints):
    model, _ = validate.load(str(checkpoints / "model-4bit"), checkpoints / "adapters")
    classes = [type(m) for m in model.modules()]
    check(model)
    assert [type(m) for m in model.modules()] == classes


@pytest.mark.parametrize("name", ["llama", "qwen3", "mixtral", "cohere"])
def test_float32_reference_is_the_model_in_float32(name):
    model, expected = tiny_models.make(name, mx.bfloat16), tiny_models.make(name, mx.bfloat16)
    expected.set_dtype(mx.float32)
    tokens = tiny_models.tokens(1, 6)
    assert checkpoint.dtype_of(model) == mx.bfloat16 and checkpoint.dtype_of(expected) == mx.float32
    with checkpoint.in_float32(model):
        logits = model(tokens)
    assert logits.dtype == mx.float32
    assert model(tokens).dtype == mx.bfloat16
    assert mx.allclose(logits, expected(tokens), rtol=1e-5, atol=1e-5)


def test_terms_are_those_of_the_fused_layers():
    model = tiny_models.make("llama")
    hidden, layers = tiny_models.HIDDEN, tiny_models.LAYERS
    with mlx_fused.patched(model) as report:
        terms = layers * (6 * hidden + 96) + hidden
        assert validate.sum_terms(model, report) == terms
        nn.quantize(model, 32, 4)
        assert validate.sum_terms(model, report) == terms
    with mlx_fused.patched(
        model, qkv=False, o_residual=False, mlp=False, linear=False, attention=False
    ) as report:
        assert validate.sum_terms(model, report) == 0


def test_a_model_that_is_never_float32_is_refused(checkpoints, monkeypatch):
    model, _ = validate.load(str(checkpoints / "model-bf16"), None)
    cls = type(model)
    monkeypatch.setattr(model, "__class__", type("Model", (cls,), {"__call__": _rounded(cls)}))
    with pytest.raises(validate.CannotValidate, match="float32"):
        check(model)


def _rounded(cls):
    return lambda self, *args, **kwargs: cls.__call__(self, *args, **kwargs).astype(mx.bfloat16)


def test_generated_text_is_that_of_mlx_lm(checkpoints):
    model, tokenizer = mlx_lm.load(str(checkpoints / "model"))
    prompt = tokenizer.encode(validate.PROMPT)
    tokens = end_to_end.continue_greedily(model, mx.array(prompt), 4)["tokens"]
    text = mlx_lm.generate(model, tokenizer, prompt, max_tokens=4)
    assert tokenizer.decode(list(tokens)).startswith(text)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["no/such/directory"], "There is no directory no/such/directory"),
        (["."], "config.json"),
        ([".", "--adapter-path", "missing"], "--adapter-path"),
        ([".", "--tokens", "1"], "--tokens"),
        ([".", "--tokens", "99999999999999999999"], "--tokens"),
        ([".", "--prompt", "\udcff\udcfe zz"], "--prompt"),
    ],
)
def test_what_cannot_be_validated_is_a_wrong_argument(arguments, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = run(*arguments)
    assert result.exit_code == 2
    assert message in result.output


def test_a_prompt_that_is_too_short(checkpoints):
    """The loss of two tokens is of one, whose attention has one key, so no gradient of queries and keys."""
    result = run(checkpoints / "model", "--prompt", "a")
    assert result.exit_code == 2
    assert "three tokens" in result.output


def test_hub_out_of_reach_says_what_to_do(tmp_path):
    code = "from mlx_fused.cli import main; main(['validate', 'an-owner/a-model'])"
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)}
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert result.returncode == 2
    assert "hf download an-owner/a-model" in result.stderr
    assert "Traceback" not in result.stderr
