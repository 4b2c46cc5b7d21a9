"""Which calls take our kernels: the table of routing.cpp, and what overrules it."""

import json
from collections import namedtuple
from itertools import product

import mlx.core as mx
import pytest

import launches
import mlx_fused
import routing_page
from graph import primitives
from metal_cost import report, routes
from metal_cost.cells import CELLS, FORMATS
from mlx_fused import _ext
from mlx_fused._ext import _internals

HALVES = [mx.float32, mx.float16, mx.bfloat16]
SIZES = ["p", "g", "s", "d"]  # of Metal's GPUs
Row = namedtuple("Row", "device part weights first last route reason")
TABLE = [Row(*row) for row in _internals.route_table()]
# How a call comes to have a part: the operation, what is wanted of its gradient, and its adapters' rank.
HAS = {
    "projection": ("qkv", {}),
    "gated": ("gated", {}),
    "normed": ("normed", {}),
    "input_gradient": ("qkv_grad", {"wanted": ["input"]}),
    "weight_gradient": ("qkv_grad", {"wanted": ["weight", "bias"]}),
    "low_rank_product": ("qkv", {"rank": 8}),
    "mid_rank_product": ("qkv", {"rank": 32}),
    "high_rank_product": ("qkv", {"rank": 33}),
    "adapter_gradient": ("qkv_grad", {"wanted": ["lora_b"], "rank": 8}),
    "mid_rank_gradient": ("qkv_grad", {"wanted": ["lora_a"], "rank": 9}),
    "high_rank_gradient": ("qkv_grad", {"wanted": ["lora_a"], "rank": 33}),
}
NAMES = {  # that the table has for them
    "projection": "projection",
    "gated": "gated projection",
    "normed": "projection with the norm of its input",
    "input_gradient": "gradient of the input",
    "weight_gradient": "gradient of weights",
    "low_rank_product": "LoRA's x A or dy B^T, rank up to 8",
    "mid_rank_product": "LoRA's x A or dy B^T, rank 9 to 32",
    "high_rank_product": "LoRA's x A or dy B^T, rank above 32",
    "adapter_gradient": "gradient of LoRA's A or B, rank up to 8",
    "mid_rank_gradient": "gradient of LoRA's A or B, rank 9 to 32",
    "high_rank_gradient": "gradient of LoRA's A or B, rank above 32",
}


SMALL_GRID = "projection or gradient of the input, small grid"


def choose_route(operation, *promoted, device="metal", rows=128, **kwargs):
    promoted = promoted or (mx.bfloat16,)
    return _internals.route(operation, promoted, rows, device=device, **kwargs)


def matching(operation, rows, device="metal", **kwargs):
    """The rows of the table that match."""
    return [
        TABLE[i] for i in _internals.matching_rows(operation, (mx.bfloat16,), rows, device=device, **kwargs)
    ]


def deciding(*args, **kwargs):
    return matching(*args, **kwargs)[0]


def quantization(form):
    """(mode, bits, group size) of a format as the kernels name it."""
    return None if form == "dense" else (form.partition("_")[0], *FORMATS[form])


def forms(weights):
    """The formats that a row of the table is about."""
    kinds = {
        "any": FORMATS,
        "fp": ("mxfp4", "mxfp8", "nvfp4"),
        "affine": [f for f in FORMATS if "affine" in f],
    }
    return kinds.get(weights, (weights,))


@pytest.fixture(scope="module")
def figures():
    return json.loads(report.RESULT.read_text())["kernels"]


@pytest.fixture(scope="module")
def unfilled(figures):
    return list(routes.unfilled(figures))


@pytest.mark.parametrize("operation", ["qkv", "qkv_grad", "output", "output_grad"])
@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_every_call_is_fused_on_the_cpu(operation, dtype):
    for rows in (0, 1, 8, 9, 1000):
        assert choose_route(operation, dtype, dtype, device="cpu", rows=rows) == "fused"


@pytest.mark.parametrize("device", ["cpu", "metal"])
@pytest.mark.parametrize("operation", ["qkv", "qkv_grad", "output"])
def test_dtypes_without_kernels_are_composed(device, operation):
    assert choose_route(operation, mx.float64, device=device) == "composed"
    assert choose_route(operation, mx.float32, mx.bfloat16, device=device) == "composed"


@pytest.mark.parametrize("operation", ["qkv", "qkv_grad", "output", "output_grad"])
@pytest.mark.parametrize("rows", [1, 128])
def test_other_gpus_are_composed_whatever_the_route(operation, rows):
    for route in (None, "fused", "composed"):
        assert choose_route(operation, device="cuda", rows=rows, route=route) == "composed"


def test_every_row_of_the_table_decides_some_calls():
    devices = [{"device": "cpu"}, *({"device": "metal", "matmul_units": units} for units in (True, False))]
    operations = [*HAS.values(), ("output", {})]
    seen = set()
    for (operation, kind), form, device, rows in product(
        operations, FORMATS, devices, (*range(10), 33, 65, 130, 1024)
    ):
        for features, line_rows in (([64], None), ([4096], None), ([4096], 9)):
            arguments = kind | device | {"quantization": quantization(form), "features": features}
            arguments["line_rows"] = line_rows
            row = deciding(operation, rows, **arguments)
            seen.add(row)
            forced = choose_route(operation, rows=rows, **arguments, route="fused")
            if forced == "fused":  # there are kernels for it, so the table is asked
                assert choose_route(operation, rows=rows, **arguments) == row.route
    assert [row for row in TABLE if row not in seen] == []


def test_the_order_of_the_table():
    """A CPU's row, those that give to MLX what our kernels do not win, and one that takes the rest."""
    cpu, *composed, last = TABLE
    assert (cpu.device, cpu.part, cpu.weights, cpu.first, cpu.last) == ("CPU", "any", "any", 0, None)
    assert {row.route for row in composed} == {"composed"}
    assert last[:6] == ("Metal", "any", "any", 0, None, "fused")
    assert all(row.reason.endswith(".") for row in TABLE)


def test_the_rows_of_the_cost_report_are_those_of_its_figures(figures):
    assert routes.INCLUDED.read_text() == routes.text(figures), "run `make metal-cost`"


def test_the_page_shows_the_table():
    text = routing_page.DOCUMENT.read_text()
    assert routing_page.page(text) == text, "run `python tests/routing_page.py`"


@pytest.mark.parametrize("name", CELLS)
def test_what_costs_more_than_mlx_is_composed(name, figures, unfilled):
    missed, _ = routes.decisive(CELLS[name], figures)
    part, weights, first, last = routes.place(CELLS[name])
    operation, kind = HAS[part]
    for form, size, rows in product(forms(weights), SIZES, {first, min(last, 4096)}):
        if part == "weight_gradient" and form != "dense":
            continue  # quantized weights have none
        arguments = {"size": size, "quantization": quantization(form), **kind}
        if missed:
            assert choose_route(operation, rows=rows, **arguments) == "composed"
        else:  # nor is any row of the table about it, unless another cell of the same place misses
            others = [c for c in CELLS.values() if routes.place(c) == (part, weights, first, last)]
            is_missed = any(routes.decisive(c, figures)[0] for c in others)
            is_missed |= any((run.part, run.weights, run.first) == (part, weights, rows) for run in unfilled)
            found = {row.part for row in matching(operation, rows, **arguments)}
            assert is_missed or NAMES[part] not in found


@pytest.mark.parametrize(
    "name, passed",
    [
        ("weight_grad", ["64-bit multiply", "branches"]),
        ("dense, rows 1", []),
        ("dense, normed, rows 1", ["with norm"]),
    ],
)
def test_only_branches_and_64_bit_products_of_tiles_and_a_norm_do_not_decide(name, passed):
    has_matrices, has_norm = "branches" in passed, "with norm" in passed
    kernel = {"step": {"cycles": 10, "multiplies_64": 0, "branches": 1}, "work": 4, "rows": 1}
    kernel |= {"threads": 1024, "spills": 0, "has_matrices": has_matrices}
    worse = kernel | {"threads": 448, "spills": 1} | ({"norm": 1} if has_norm else {})
    worse["step"] = {"cycles": 11, "multiplies_64": 1, "branches": 2}
    cell = CELLS[name]
    decide, others = routes.decisive(cell, {cell.ours: worse, cell.mlx: kernel})
    assert [*others] == passed
    assert {*decide} == {"cycles", "threads", "64-bit multiply", "branches", "spills"} - {*passed}


@pytest.mark.parametrize(
    "operation, kind, parts",
    [
        ("qkv", {}, ["projection"]),
        ("gated", {}, ["gated"]),
        ("normed", {}, ["projection", "normed"]),
        ("qkv", {"rank": 8}, ["projection", "low_rank_product"]),
        ("qkv", {"rank": 9}, ["projection", "mid_rank_product"]),
        ("qkv", {"rank": 33}, ["projection", "high_rank_product"]),
        ("qkv_grad", {"wanted": ["input"]}, ["input_gradient"]),
        ("qkv_grad", {"wanted": ["input"], "rank": 8}, ["input_gradient", "low_rank_product"]),
        ("qkv_grad", {"wanted": ["bias", "weight"], "rank": 8}, ["weight_gradient"]),
        ("qkv_grad", {"wanted": ["lora_a"], "rank": 33}, ["high_rank_product", "high_rank_gradient"]),
        (
            "qkv_grad",
            {"wanted": ["weight", "lora_b"], "rank": 8},
            ["weight_gradient", "low_rank_product", "adapter_gradient"],
        ),
    ],
)
def test_the_parts_of_a_call(operation, kind, parts):
    """Of those that the table has rows about, for many rows of the input."""
    known = {row.part for row in TABLE if row.last is None and row.weights in ("any", "dense")}
    found = {row.part for row in matching(operation, 4096, **kind)} - {"any"}
    assert found == {NAMES[part] for part in parts} & known


@pytest.mark.parametrize("part", ["projection", "gated", "input_gradient"])
@pytest.mark.parametrize("form", ["dense", "affine_4", "mxfp4"])
def test_tiles_that_are_not_full_are_compared_as_they_are(part, form, figures):
    operation, kind = HAS[part]
    for rows in range(9, 513):
        ours, mlx = routes.cycles(figures, part, form, rows)
        if round(ours / mlx, 2) > 1:
            about = {"quantization": quantization(form), "size": "g", **kind}
            assert choose_route(operation, rows=rows, **about) == "composed"


def test_cycles_of_tiles_by_hand(figures):
    def cost(name):
        return report.cost(figures[name])

    assert routes.cycles(figures, "projection", "affine_4", 9) == (
        32 * cost("projection_32_affine_4"),
        min(2 * cost("affine_qmv_wide_affine_4_5"), 32 * cost("qmm_t_affine_4")),
    )
    assert routes.cycles(figures, "projection", "dense", 65) == (
        128 * cost("projection_64_dense"),
        128 * cost("gemm_nt"),
    )
    assert routes.cycles(figures, "input_gradient", "affine_4", 3) == (
        64 * cost("input_grad_64_affine_4"),
        32 * cost("qmm_n_affine_4"),
    )


def test_short_examples_that_lie_apart_are_composed():
    apart = "projection or gradient of the input, short examples apart"
    for operation in ("qkv", "qkv_grad"):
        for line_rows, rows, is_short in ((4, 64, True), (127, 254, True), (128, 256, False), (4, 8, False)):
            found = {row.part for row in matching(operation, rows, line_rows=line_rows)}
            assert (apart in found) == is_short
        assert apart not in {row.part for row in matching(operation, 64)}


@pytest.mark.parametrize("size", SIZES)
def test_mlx_adds_a_residual_alone(size):
    alone = "projection + residual alone"
    for rows in (0, 1, 9, 31, 4096):
        assert deciding("output", rows, size=size).part == alone
        assert choose_route("output", rows=rows, size=size) == "composed"
        for kind in ({"has_bias": True}, {"rank": 8}, {"quantization": ("affine", 4, 64)}):
            assert deciding("output", rows, size=size, **kind).part != alone
    assert deciding("output", 8, size=size).part != alone
    assert deciding("qkv", 1, size=size).part != alone
    assert deciding("output", 9, size=size, exact=True).part != alone  # MLX rounds between, in two launches
    assert choose_route("output_grad", size=size) == "composed"  # there is no kernel


@pytest.mark.parametrize("size, cores", [("p", 6), ("g", 10), ("s", 40), ("d", 80)])
def test_few_rows_need_threadgroups_enough_for_the_cores(size, cores):
    def is_small(rows, *features):
        found = matching("qkv", rows, size=size, features=features)
        return SMALL_GRID in {row.part for row in found}

    for rows, features in ((2, 64 * cores), (4, 64 * cores), (6, 32 * cores), (8, 32 * cores)):
        assert not is_small(rows, features)
        assert is_small(rows, features - 8)
        assert not is_small(rows, features - 8, 1)
    assert not is_small(1, 8)  # MLX's kernel has fewer


LAUNCHES = json.loads(launches.GOLDEN.read_text())


@pytest.mark.parametrize("case", LAUNCHES, ids=lambda c: "{call}-{weights}-{rows}-{model}".format(**c))
def test_small_grids_are_those_of_the_plans(case):
    about = {"features": case["features"], "in_features": case["in_features"]}
    about |= {"quantization": quantization(case["weights"]), "has_bias": case["call"] == "output"}
    about |= {"wanted": ["input"]} if case["call"].endswith("grad") else {}
    for size, (threadgroups, *_) in case["ours"].items():
        found = {row.part for row in matching(case["call"], case["rows"], size=size, **about)}
        too_few = threadgroups < 8 * launches.CORES[size]
        assert (SMALL_GRID in found) == (too_few and case["rows"] > 1)


@pytest.mark.parametrize("case", LAUNCHES, ids=lambda c: "{call}-{weights}-{rows}-{model}".format(**c))
def test_calls_with_too_few_threadgroups_are_composed(case):
    for name in case["misses"]:
        about = {"rows": case["rows"], "features": case["features"], "in_features": case["in_features"]}
        about |= {"quantization": quantization(case["weights"]), "size": name[-1]}
        assert choose_route(case["call"], **about, matmul_units=name.startswith("g17")) == "composed"


@pytest.mark.parametrize(
    "architecture, generation, darwin, size, cores, matmul_units",
    [
        ("applegpu_g13g", 13, (25, 2), "g", 10, False),
        ("applegpu_g16s", 16, (26, 0), "s", 40, False),
        ("applegpu_g14d", 14, (25, 2), "d", 80, False),
        ("applegpu_g17s", 17, (25, 2), "s", 40, True),
        ("applegpu_g17s", 17, (25, 1), "s", 40, False),
        ("applegpu_g17p", 17, (25, 2), "p", 6, False),
        ("applegpu_g18p", 18, (25, 2), "p", 6, True),
        ("", 0, (0, 0), "g", 10, False),
    ],
)
def test_a_metal_gpu_is_known_by_its_architecture(
    architecture, generation, darwin, size, cores, matmul_units
):
    for is_apple7 in (True, False):
        found = _internals.metal_device(architecture, generation, is_apple7, darwin)
        assert found == (size, cores, is_apple7, matmul_units)


@pytest.mark.parametrize("operation", ["qkv", "qkv_grad", "output", "output_grad"])
@pytest.mark.parametrize("rows", [1, 8, 128])
def test_gpus_without_simdgroup_matrices_are_composed_whatever_the_route(operation, rows):
    for route in (None, "fused"):
        for kind in ({}, {"quantization": ("affine", 4, 64)}, {"has_bias": True, "rank": 8}):
            assert choose_route(operation, rows=rows, is_apple7=False, route=route, **kind) == "composed"


@pytest.mark.parametrize("operation", ["qkv", "qkv_grad", "output"])
def test_matmul_units_take_the_large_products(operation):
    for rows, takes in ((1, False), (31, False), (32, True), (4096, True)):
        row = deciding(operation, rows, has_bias=True, matmul_units=True)
        assert (row.device == "Metal, M5 and later") == takes
        assert row.route == "composed" or not takes


def test_metal_has_no_kernel_for_an_empty_sum_or_a_bias_gradient_alone():
    for route in (None, "fused"):
        assert choose_route("qkv", in_features=0, route=route) == "composed"
        assert choose_route("qkv_grad", no_metal_kernel=True, route=route) == "composed"
    assert choose_route("qkv_grad", no_metal_kernel=True, device="cpu") == "fused"
    assert choose_route("output_grad", quantization=("affine", 4, 64), route="fused") == "composed"
    assert choose_route("output_grad", rank=8, route="fused") == "fused"


def test_metal_has_no_kernel_for_other_formats():
    for mode, bits, group_size in (("affine", 7, 64), ("affine", 4, 16), ("mxfp4", 4, 64), ("nvfp4", 4, 32)):
        for route in (None, "fused"):
            assert choose_route("qkv", quantization=(mode, bits, group_size), route=route) == "composed"


def test_a_route_overrules_the_table_and_the_variable(monkeypatch):
    assert choose_route("qkv", matmul_units=True, route="fused") == "fused"
    assert choose_route("qkv", route="composed") == "composed"
    monkeypatch.setenv("MLX_FUSED_ROUTE", "fused")
    assert choose_route("qkv", matmul_units=True) == "fused"
    assert choose_route("qkv", matmul_units=True, route="composed") == "composed"
    monkeypatch.setenv("MLX_FUSED_ROUTE", "composed")
    assert choose_route("qkv") == choose_route("qkv", device="cpu") == "composed"
    assert choose_route("qkv", route="fused") == "fused"


def calls(route=None):
    """The four operations, as functions of arrays of ones."""
    x, w = mx.ones((1, 2, 4)), mx.ones((4, 4))
    g = mx.ones((1, 2, 1, 4)), mx.ones((1, 1, 1, 4))
    x1, w3 = mx.ones((1, 1, 4)), mx.ones((16, 4))
    return [
        lambda: mlx_fused.fused_qkv_projection(x1, w3, None, 2, 1, 4, route=route),
        lambda: mlx_fused.fused_qkv_projection_bwd(g[0], g[1], g[1], x1, w3, False, 2, 1, 4, route=route)[:2],
        lambda: [mlx_fused.fused_output_projection_residual(x, w, None, x, route=route)],
        lambda: mlx_fused.fused_output_projection_residual_bwd(x, x, w, False, route=route)[:2],
    ]


@pytest.mark.parametrize("index", range(4))
def test_the_keyword_and_the_variable_reach_every_operation(index, monkeypatch):
    def fused(route=None):
        return any(name.startswith("Fused") for name in primitives(*calls(route)[index]()))

    assert fused()
    assert fused("fused")
    assert not fused("composed")
    monkeypatch.setenv("MLX_FUSED_ROUTE", "composed")
    assert not fused()
    assert fused("fused")
    with pytest.raises(ValueError, match=r"route must be 'composed', 'fused' or None but got 'slow'\."):
        fused("slow")


def test_the_latest_decision_says_what_decided(monkeypatch):
    def decided(route=None):
        calls(route)[0]()
        return _ext.last_decision()

    assert decided() == ("fused", "built-in", TABLE[0].reason)
    assert decided("composed")[:2] == ("composed", "route")
    monkeypatch.setenv("MLX_FUSED_ROUTE", "fused")
    assert decided()[:2] == ("fused", "MLX_FUSED_ROUTE")
    assert decided("composed")[:2] == ("composed", "route")
    x = mx.ones((1, 2, 4)).astype(mx.float64, stream=mx.cpu)
    mlx_fused.fused_output_projection_residual(x, mx.ones((4, 4)), None, x)
    assert _ext.last_decision()[:2] == ("composed", "no kernel")


def test_a_gradient_is_routed_on_its_own(monkeypatch):
    x, w = mx.ones((1, 2, 4)), mx.ones((4, 4))
    y, grads = [], []

    def loss(w):
        y.append(mlx_fused.fused_output_projection_residual(x, w, None, x, route="fused"))
        monkeypatch.setenv("MLX_FUSED_ROUTE", "composed")
        return y[0].sum()

    grads = mx.grad(loss)(w)
    assert "FusedOutputProjectionGrad" not in primitives(grads)
    assert mx.array_equal(grads, mx.full((4, 4), 2.0))


@pytest.mark.parametrize("dtype", [mx.float32, mx.float64], ids=str)
def test_what_routing_composes_adds_in_its_products(dtype, monkeypatch):
    """As mlx.nn.Linear does: one launch on GPUs."""
    monkeypatch.setenv("MLX_FUSED_ROUTE", "composed")
    x, w, b = (mx.ones(shape).astype(dtype) for shape in ((2, 3, 4), (4, 4), (4,)))
    mx.eval(x, w, b)
    plain = mlx_fused.fused_output_projection_residual(x, w, None, x, alpha=0.5)
    assert primitives(plain)["AddMM"] == 1 and not {"Add", "Matmul", "Multiply"} & set(primitives(plain))
    biased = primitives(*mlx_fused.fused_qkv_projection(x, (w, w, w), (b, b, b), 2, 2, 2))
    assert biased["AddMM"] == 3 and not biased["Add"] and not biased["Matmul"]
    both = primitives(mlx_fused.fused_output_projection_residual(x, w, b, x))
    assert both["AddMM"] == both["Add"] == 1 and not both["Matmul"]
    merged = mx.compile(lambda x: tuple(mlx_fused.fused_qkv_projection(x, (w, w, w), (b, b, b), 2, 2, 2)))(x)
    assert primitives(*merged)["AddMM"] == 1


def test_a_misspelt_variable_is_refused(monkeypatch):
    monkeypatch.setenv("MLX_FUSED_ROUTE", "Fused")
    with pytest.raises(ValueError, match=r"MLX_FUSED_ROUTE must be 'composed' or 'fused' but got 'Fused'\."):
        calls()[0]()


def test_metal_refuses_rows_that_tiles_cannot_step_through():
    assert choose_route("qkv", in_features=2**25 - 1, route="fused") == "fused"
    assert choose_route("qkv", in_features=2**25, route="fused") == "composed"


def test_vmap_routes_all_rows_together(monkeypatch):
    x, w = mx.ones((3, 1, 2, 4)), mx.ones((4, 4))

    def call(x):
        out = mlx_fused.fused_output_projection_residual(x, w, None, x, route="fused")
        monkeypatch.setenv("MLX_FUSED_ROUTE", "composed")
        return out

    out = mx.vmap(call)(x)
    assert "FusedOutputProjection" not in primitives(out)
    assert mx.array_equal(out, mx.full((3, 1, 2, 4), 5.0))


def test_a_route_that_cannot_be_met_is_refused():
    x, w = mx.ones((1, 2, 4)).astype(mx.float64, stream=mx.cpu), mx.ones((4, 4))
    with pytest.raises(ValueError, match=r"route must be 'composed' or None .* but got 'fused'\."):
        mlx_fused.fused_output_projection_residual(x, w, None, x, route="fused")
