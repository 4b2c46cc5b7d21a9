"""Which calls take our kernels: the table of routing.cpp, and what overrules it."""

import mlx.core as mx
import pytest

import mlx_fused
from graph import primitives
from mlx_fused._ext import _internals

HALVES = [mx.float32, mx.float16, mx.bfloat16]


def choose_route(operation, *promoted, device="metal", rows=128, **kwargs):
    promoted = promoted or (mx.bfloat16,)
    return _internals.route(operation, promoted, rows, device=device, **kwargs)


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


@pytest.mark.parametrize("rows", [1, 8, 9, 31, 32, 4096])
def test_metal_fuses_what_saves_launches(rows):
    assert choose_route("qkv", rows=rows) == "fused"
    assert choose_route("qkv_grad", rows=rows) == "fused"
    assert choose_route("output", rows=rows, has_bias=True) == "fused"
    # Without a bias MLX's addmm is one launch too, but reads the weights once per row for a few rows.
    assert choose_route("output", rows=rows) == ("fused" if rows == 8 else "composed")
    assert choose_route("output_grad", rows=rows) == "composed"


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
        for kind in ({}, {"quantization": ("affine", 4, 64)}, {"has_bias": True, "has_adapters": True}):
            assert choose_route(operation, rows=rows, is_apple7=False, route=route, **kind) == "composed"


@pytest.mark.parametrize("operation", ["qkv", "qkv_grad", "output"])
def test_matmul_units_take_the_large_products(operation):
    for rows, expected in ((1, "fused"), (31, "fused"), (32, "composed"), (4096, "composed")):
        assert choose_route(operation, rows=rows, has_bias=True, matmul_units=True) == expected


def test_metal_has_no_kernel_for_an_empty_sum_or_a_bias_gradient_alone():
    for route in (None, "fused"):
        assert choose_route("qkv", in_features=0, route=route) == "composed"
        assert choose_route("qkv_grad", no_metal_kernel=True, route=route) == "composed"
    assert choose_route("qkv_grad", no_metal_kernel=True, device="cpu") == "fused"


def test_metal_fuses_quantized_projections_and_adapters():
    quantized, adapted = {"quantization": ("affine", 4, 64)}, {"has_adapters": True}
    for rows in (1, 8, 31, 32, 4096):
        for kind in (quantized, adapted, quantized | adapted):
            for operation in ("qkv", "qkv_grad", "output"):
                assert choose_route(operation, rows=rows, **kind) == "fused"
                expected = "composed" if rows >= 32 else "fused"
                assert choose_route(operation, rows=rows, matmul_units=True, **kind) == expected
            # MLX's quantized_matmul is one launch for the output's one segment; adapters are more.
            assert choose_route("output_grad", rows=rows, **kind) == (
                "composed" if kind == quantized else "fused"
            )


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
    assert choose_route("qkv", in_features=2**25 - 1) == "fused"
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
