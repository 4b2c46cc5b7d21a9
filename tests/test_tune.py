"""``mlx-fused tune``: what is timed, and the routes that follow."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from functools import partial
from itertools import pairwise
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import mlx_lm
import pytest
from click.testing import CliRunner

import mlx_fused
from commands import COMMAND
from graph import primitives
from mlx_fused import _ext, tuning
from mlx_fused.cli import main
from mlx_fused.tuning import Kind, measure, table
from mlx_fused.tuning.calls import kinds_of
from mlx_fused.tuning.measure import QUICK, Effort, route_of, with_gradients
from mlx_fused.tuning.table import Timing
from mlx_fused.validate import CannotValidate
from tiny_models import make
from tuned import CALLS, COMPOSED, EVEN, FUSED, GATED, OUTPUT, PLAIN, write

pytestmark = pytest.mark.usefixtures("route_cache")

FORMATS = (None, ("affine", 4, 64), ("affine", 8, 32), ("mxfp4", 4, 32))
KINDS = [
    kind
    for one in (PLAIN, OUTPUT, GATED)
    for form in FORMATS
    for bias in (False, True)
    for rank in (0, 8)
    for kind in with_gradients(one._replace(format=form, bias=bias, ranks=tuple(rank for _ in one.ranks)))
]
KINDS += [PLAIN._replace(ranks=(8, 0, 8)), PLAIN._replace(format=("affine", 4, 32))]
KINDS += [OUTPUT._replace(ranks=(4,))]
KINDS += [PLAIN._replace(dtype=mx.float16), PLAIN._replace(in_features=32), OUTPUT._replace(features=(32,))]


@pytest.fixture
def quick(monkeypatch):
    """`mlx-fused tune` with two numbers of rows, and hardly any time for each."""
    monkeypatch.setattr(measure, "ROWS", (1, 3))
    monkeypatch.setattr(sys.modules["mlx_fused.cli.tune"], "EFFORT", QUICK)
    return partial(CliRunner().invoke, main)


# What is timed


def test_routes_take_turns_and_medians_count():
    now, calls = 0.0, []
    pace = {"fused": iter([1, 2, 2, 9, 3]), "composed": iter([1, 8, 8, 8, 8])}

    def run(name, count):
        nonlocal now
        calls.append((name, count))
        now += next(pace[name]) * count

    runs = {name: partial(run, name) for name in pace}
    seconds = measure.compare(runs, Effort(rounds=3, turn=8, limit=1000), lambda: now)
    assert seconds == {"fused": 3, "composed": 8}
    # Each once to warm up and once to see how many fit a turn.
    assert calls == [("fused", 1), ("composed", 1)] * 2 + [("fused", 4), ("composed", 1)] * 3


def test_a_cell_that_takes_long_has_fewer_rounds():
    now, calls = 0.0, []

    def run(count):
        nonlocal now
        calls.append(count)
        now += 10

    measure.compare({"fused": run, "composed": run}, Effort(rounds=7, turn=1, limit=59), lambda: now)
    assert calls == [1] * 6


def test_calls_that_would_take_too_long_are_not_made(monkeypatch):
    seconds = {"fused": 0.1, "composed": 1.0}
    monkeypatch.setattr(measure, "compare", lambda *args: seconds)
    done = []
    found = measure.measure(PLAIN, (1, 2, 8), replace(QUICK, never=4), partial(done.append, None))
    assert found == {1: Timing("fused", 0.1, 1.0), 2: Timing("fused", 0.1, 1.0), 8: Timing("fused", 0.1, 1.0)}
    seconds["composed"] = 2.1
    found = measure.measure(PLAIN, (1, 2, 8), replace(QUICK, never=4), partial(done.append, None))
    assert list(found) == [1]
    assert len(done) == 6


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_each_route_is_the_one_that_is_timed(kind, monkeypatch):
    monkeypatch.setenv("MLX_FUSED_ROUTE", "composed")  # of the user
    graphs, made = {}, []

    def chain(function, first, rests):
        for layers in rests:
            made.append(layers)
            results = function(first, *layers)
            graphs[os.environ["MLX_FUSED_ROUTE"]] = primitives(*results)
            per_layer = (1 + kind.bias) * kind.of_weights + 2 * any(kind.ranks)
            outputs = len(layers) if kind.operation == "qkv" else 1
            assert len(results) == (1 + per_layer * len(layers) if kind.gradient else outputs)
            assert results[0].dtype == kind.dtype

    monkeypatch.setattr(measure, "chain", chain)
    measure.measure(kind, (3,), QUICK)
    assert set(graphs) == {"fused", "composed"}
    names = {"qkv": "FusedQKVProjection", "linear": "FusedOutputProjection", "gated": "FusedGatedProjection"}
    name = names[kind.operation]
    ours = [{n for n in graphs[r] if re.match("Fused(?!Activation)", n)} for r in measure.ROUTES]
    # The gradient of gate and up needs these, which are always made by our kernel.
    before = {name} if kind.operation == "gated" and kind.gradient else set()
    assert ours == [{name + "Grad" * kind.gradient} | before, before]
    assert os.environ["MLX_FUSED_ROUTE"] == "composed"
    # Also those of the other route.
    assert all(one[0].weight is not next[0].weight for one, next in pairwise(made))


def test_gradients_are_those_of_a_call_that_ran_fused(monkeypatch):
    right, routes = mlx_fused.fused_qkv_projection, []

    def spied(*args, route, **options):
        routes.append(route)
        return right(*args, route=route, **options)

    monkeypatch.setattr(mlx_fused, "fused_qkv_projection", spied)
    measure.measure(PLAIN._replace(gradient=True), (3,), QUICK)
    assert set(routes) == {"fused"}


@pytest.mark.parametrize("kind", [PLAIN, OUTPUT._replace(format=FORMATS[1], ranks=(8,), bias=True)], ids=str)
def test_the_weights_in_turn_fill_more_than_a_cache(kind, monkeypatch):
    used = []
    monkeypatch.setattr(measure, "chain", lambda function, first, rests: used.extend(rests))
    effort = Effort(rounds=160, turn=0, rotated=2**20)
    measure.measure(kind, (1,), effort)
    arrays = {id(a): a for layers in used for layer in layers for a in layer if isinstance(a, mx.array)}
    assert 2**20 <= sum(a.nbytes for a in arrays.values()) < 2**20 + 2**16
    assert measure.Effort().rotated > 256 * 2**20


def test_a_chain_of_gradients_waits_for_each_call(monkeypatch):
    kind, evaluated = PLAIN._replace(gradient=True), []
    monkeypatch.setattr(mx, "eval", lambda *arrays: evaluated.extend(arrays))
    function, first = measure._function(kind, 3, "fused")
    measure.chain(function, first, [measure._layers(kind)] * 5)
    assert primitives(*evaluated)["FusedQKVProjectionGrad"] == 5


def test_what_has_no_kernels_is_left_out(quick, monkeypatch):
    assert measure.has_choice(PLAIN) and not measure.has_choice(PLAIN._replace(dtype=mx.float64))
    monkeypatch.setattr(measure, "has_choice", lambda kind: False)
    done = quick(["tune"])
    assert done.exit_code == 2 and "There are no kernels for Device(cpu, 0)" in done.output


# The calls of a model


def test_the_calls_of_a_quantized_model_and_of_its_lora_step(checkpoint):
    model, _ = mlx_lm.load(str(checkpoint / "model-4bit"))
    qkv = Kind(False, False, mx.float32, ("affine", 4, 32), False, 32, (64, 32, 32), (0, 0, 0))
    output = qkv._replace(in_features=64, features=(32,), ranks=(0,))
    gated, down = qkv._replace(features=(32, 32), ranks=(0, 0)), output._replace(in_features=32)
    head = down._replace(features=(model.args.vocab_size,))
    plain = qkv, output, gated, down
    adapted = [kind._replace(ranks=(8,) * len(kind.ranks)) for kind in plain]
    expected = [kind for one in (*plain, head, *adapted) for kind in with_gradients(one)]
    assert len(expected) == 18 and not any(kind.of_weights for kind in expected)
    assert set(kinds_of(model)) == set(expected)


def test_the_calls_of_dense_models():
    found = kinds_of(make("qwen2", mx.bfloat16))
    plain = Kind(False, False, mx.bfloat16, None, True, 64, (64, 32, 32), (0, 0, 0))
    assert set(with_gradients(plain)) < set(found) and len(with_gradients(plain)) == 3
    assert {k.ranks[0] for k in found} == {0, 8}
    assert {k.bias for k in found if k.operation == "linear"} == {False}


def test_a_model_without_fused_calls_is_refused():
    with pytest.raises(CannotValidate, match="Nothing of it runs fused"):
        kinds_of(FewLayers())


class FewLayers(nn.Module):
    layers = ()

    def __call__(self, tokens):
        return tokens


# Routes from the table


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_a_measured_route_is_that_of_its_own_kind_alone(kind):
    _ext.set_tuned_routes(mx.cpu, [(kind, {1: "composed"})])
    assert [other for other in KINDS if _ext.tuned_route(other, 3)] == [kind]
    assert route_of(kind, 3) == "composed"
    # The gradient of a call that is composed itself is MLX's own.
    forward = kind._replace(gradient=False, of_weights=False)
    others = [other for other in KINDS if other not in (kind, forward)]
    _ext.set_tuned_routes(mx.cpu, [(other, {1: "composed"}) for other in others])
    assert route_of(kind, 3) == "fused"


@pytest.mark.parametrize("rows, route", [(1, "composed"), (4, "composed"), (7, "composed"), (8, "fused")])
@pytest.mark.parametrize("split", [True, False])
def test_rows_between_take_the_nearest_below(rows, route, split):
    _ext.set_tuned_routes(mx.cpu, [(PLAIN, {4: "composed", 8: "fused", 32: None, 64: "composed"})])
    assert route_of(PLAIN, rows) == route == _ext.tuned_route(PLAIN, rows)
    x, w = mx.ones((2, rows // 2, 64)), (mx.ones((64, 64)), mx.ones((32, 64)), mx.ones((32, 64)))
    if rows % 2 == 0:
        heads = {"num_heads": 4, "num_kv_heads": 2, "head_dim": 16} if split else {"split_heads": False}
        names = primitives(*mlx_fused.fused_qkv_projection(x, w, **heads))
        assert ("FusedQKVProjection" in names) == (route == "fused")


def test_even_rows_are_the_built_in_tables():
    _ext.set_tuned_routes(mx.cpu, [(PLAIN, {4: "composed", 8: None, 32: "composed"})])
    assert [_ext.tuned_route(PLAIN, m) for m in (7, 8, 31, 32)] == ["composed", None, None, "composed"]
    assert route_of(PLAIN, 8) == "fused"


@pytest.mark.parametrize(
    "fused, composed, route",
    [(1, 2, "fused"), (2, 1, "composed"), (1, 1.029, None), (1.029, 1, None), (1, 1.031, "fused")],
)
def test_closer_than_three_per_cent_is_even(fused, composed, route):
    assert Timing.of(fused, composed) == (route, fused, composed)


def test_the_variable_and_the_keyword_overrule_it(monkeypatch):
    _ext.set_tuned_routes(mx.cpu, [(PLAIN, {1: "composed"})])
    x, w = mx.ones((1, 3, 64)), (mx.ones((64, 64)), mx.ones((32, 64)), mx.ones((32, 64)))

    def is_fused(route=None):
        found = mlx_fused.fused_qkv_projection(x, w, split_heads=False, route=route)
        return "FusedQKVProjection" in primitives(*found)

    assert not is_fused() and is_fused("fused")
    monkeypatch.setenv("MLX_FUSED_ROUTE", "fused")
    assert is_fused() and not is_fused("composed")


def test_routes_of_a_gpu_are_not_those_of_the_cpu():
    _ext.set_tuned_routes(mx.gpu, [(PLAIN, {1: "composed"})])
    assert route_of(PLAIN, 1) == "fused"


# The command


def test_tune_writes_what_it_measured_of_a_model(quick, checkpoint):
    done = quick(["tune", str(checkpoint / "model-4bit"), "--json"])
    assert done.exit_code == 0, done.output
    found = table.read(tuning.path()).calls
    assert set(found) == set(kinds_of(mlx_lm.load(str(checkpoint / "model-4bit"))[0]))
    assert all(list(timings) == [1, 3] for timings in found.values())
    results = json.loads(done.stdout)
    assert results["calls"] == json.loads(Path(tuning.path()).read_text())["calls"]
    assert "LoRA rank 8" in done.stderr and f"Written: {tuning.path()}" in done.stderr.replace("\n", " ")


def test_a_model_is_routed_by_what_was_measured(checkpoint, monkeypatch):
    folder = str(checkpoint / "model-4bit")
    model, _ = mlx_lm.load(folder)
    adapted, _ = mlx_lm.load(folder, adapter_path=str(checkpoint / "adapters"))
    tokens = mx.array([[1, 2, 3]])

    def fused(model):
        with mlx_fused.patched(model):
            counts = primitives(model(tokens))
        return counts["FusedQKVProjection"], counts["FusedOutputProjection"]

    assert fused(model) == fused(adapted) == (2, 4)
    kinds = kinds_of(mlx_lm.load(folder)[0])
    write({kind: {1: FUSED, 2: COMPOSED} for kind in kinds if kind.operation == "qkv" and any(kind.ranks)})
    tuning.use_table()
    assert fused(model) == (2, 4) and fused(adapted) == (0, 4)
    write({kind: {1: FUSED, 2: COMPOSED, 8: FUSED} for kind in kinds})
    tuning.use_table()
    assert fused(model) == fused(adapted) == (0, 0)
    monkeypatch.setenv("MLX_FUSED_ROUTE", "fused")
    assert fused(model) == fused(adapted) == (2, 4)


def test_adapters_of_a_folder_are_measured_as_they_are(quick, checkpoint):
    arguments = [str(checkpoint / "model-4bit"), "--adapter-path", str(checkpoint / "adapters")]
    assert quick(["tune", *arguments]).exit_code == 0
    head = json.loads((checkpoint / "model-4bit" / "config.json").read_text())["vocab_size"]
    found = table.read(tuning.path()).calls
    assert {kind.features for kind in found if not all(kind.ranks)} == {(head,)}  # never adapted


def test_without_a_model_it_measures_llamas_sizes(quick, monkeypatch):
    made = []
    monkeypatch.setattr(measure, "measure", lambda kind, *args: made.append(kind) or {1: FUSED})
    assert quick(["tune"]).exit_code == 0
    assert {(kind.in_features, kind.features) for kind in made} == {
        (2048, (2048, 512, 512)),
        (2048, (2048,)),
        (2048, (8192, 8192)),
        (8192, (2048,)),
        (2048, (128256,)),
    }
    assert list(table.read(tuning.path()).calls) == made
    # Dense with the gradients by weights; 4-bit; 4-bit with adapters, which a head has none of.
    assert len(made) == 3 * 5 + 2 * 5 + 2 * 4


def test_a_terminal_of_80_columns_shows_all_numbers(monkeypatch, run):
    monkeypatch.setenv("COLUMNS", "80")
    timings = {m: Timing("fused", 1.0, 9.99) for m in measure.ROWS}
    monkeypatch.setattr(measure, "measure", lambda *args: timings)
    _, out, _ = run(main, ["tune"])
    header, _, *rows = (line.split() for line in out.splitlines() if line.strip())
    assert header == ["tokens", *map(str, measure.ROWS)]
    assert rows[:33] == [[f"[{n}]", *["9.99"] * len(measure.ROWS)] for n in range(1, 34)]


def test_remove(quick):
    path = write(CALLS)
    done = quick(["tune", "--remove"])
    assert (done.exit_code, done.output) == (0, f"Removed: {path}\n") and not path.exists()
    done = quick(["tune", "--remove"])  # once more
    assert (done.exit_code, done.output) == (0, f"Nothing to remove: there is no {path}\n")


@pytest.mark.parametrize(
    "arguments, said",
    [
        (["--remove", "model"], "--remove takes no MODEL and no --adapter-path."),
        (["--adapter-path", "."], "--adapter-path needs a MODEL."),
        (["nosuch/folder/of/mine"], "There is no directory nosuch/folder/of/mine."),
    ],
)
def test_wrong_arguments_end_in_one_line(run, arguments, said):
    code, _, err = run(main, ["tune", *arguments])
    assert code == 2 and err.splitlines()[-1].endswith(said)


def test_a_folder_that_cannot_be_written_ends_in_one_line_before_anything_is_measured(run, monkeypatch):
    monkeypatch.setenv("MLX_FUSED_CACHE", os.devnull)
    monkeypatch.setattr(measure, "measure", pytest.fail)
    code, _, err = run(main, ["tune"])
    assert code == 1 and len(err.splitlines()) == 1 and os.devnull in err


def test_what_cannot_be_removed_ends_in_one_line(run, route_cache):
    (route_cache / "routes.json").mkdir(parents=True)
    with pytest.warns(UserWarning, match="it is no file"):
        tuning.use_table()
    code, _, err = run(main, ["tune", "--remove"])
    assert code == 1 and err.splitlines()[-1].endswith("cannot be removed: Is a directory.")


def test_patching_that_is_off_is_an_error(run, monkeypatch):
    monkeypatch.setenv("MLX_FUSED", "0")
    assert run(main, ["tune"])[0] == 2


def test_after_ctrl_c_the_file_is_as_it_was(route_cache):
    path = write(CALLS)
    before = path.read_bytes()
    code = "import mlx_fused.tuning.measure as m\nright = m.measure\ndef slow(*a):\n    "
    code += "print('begun', flush=True); return right(*a)\nm.measure = slow\n"
    tune = subprocess.Popen(
        [sys.executable, "-c", code + COMMAND[-1], "tune", "--json"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert tune.stdout.readline() == "begun\n"
    time.sleep(0.3)  # anywhere within
    tune.send_signal(signal.SIGINT)
    _, err = tune.communicate()
    assert tune.returncode == 130 and "Aborted!" in err and "Traceback" not in err
    assert path.read_bytes() == before
    assert sorted(p.name for p in route_cache.iterdir()) == ["routes.json", "routes.json.lock"]


def test_info_tells_what_was_measured():
    from mlx_fused.cli.calls import Sizes, kinds

    qkv = kinds(Sizes(), "4-bit")["QKV"]
    write({qkv: {1: COMPOSED, 8: EVEN, 100: FUSED}})
    tuning.use_table()
    routes = json.loads(CliRunner().invoke(main, ["info", "--json"]).stdout)["routes"]
    found = [(cell["route"], cell["source"]) for cell in routes["4-bit: QKV"].values()]
    tuned = ("fused", "tuned")
    assert found == [("composed", "tuned"), ("fused", "built-in"), tuned, tuned]
    assert {cell["source"] for cell in routes["bfloat16: QKV"].values()} == {"built-in"}
