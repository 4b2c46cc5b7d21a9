"""What the Metal kernels cost: the recorded figures are of today's sources, and no worse than accepted."""

import json
from dataclasses import replace

import pytest

from metal_cost import cells, loops, measure, page, report
from metal_cost.cells import KERNELS, METAL
from metal_cost.mistakes import MISTAKES
from metal_cost.translate import entry, kernels, translate

STALE = "the kernels or what measures them changed: run `make metal-cost`"


@pytest.fixture(scope="module")
def result():
    return json.loads(report.RESULT.read_text())


def test_figures_are_of_these_sources(result):
    assert result["fingerprint"] == report.fingerprint(), STALE


def test_page_is_of_these_figures(result):
    text = page.DOCUMENT.read_text()
    assert page.page(text, result["kernels"]) == text, STALE


def test_misses_are_those_accepted(result):
    assert report.all_misses(result["kernels"]) == report.accepted()


def test_every_kind_of_kernel_is_measured(result):
    assert list(result["kernels"]) == [*KERNELS, *(m.kernel.name for m in MISTAKES.values())]
    # Activations by themselves have no loop: they take as long as their memory.
    assert {k.source for k in KERNELS.values()} >= {*METAL.glob("*.metal")} - {METAL / "activation.metal"}
    made = kernels(report.flattened(METAL / "projection_rows.metal"))
    names = {name.removesuffix("_float16") for name in made if name.endswith("_float16")}
    plain = {name for name in names if "_normed_" not in name}
    normed = {name for name in names - plain if name.split("_", 4)[4] in cells.TILE_FORMATS}
    measured = {name.split(",")[0] for name in KERNELS if name.startswith("projection_rows")}
    assert measured == plain | normed


@pytest.mark.parametrize("change, is_stale", [("int changed;", True), ('# 1 "own/moved.metal"', False)])
def test_a_change_of_a_source_is_noticed(monkeypatch, change, is_stale):
    before, text_of = report.fingerprint(), report.flattened
    monkeypatch.setattr(report, "flattened", lambda path: f"{text_of(path)}\n{change}")
    assert (report.fingerprint() != before) == is_stale


# What the compiler prints: a form before the last, the last, and what runs before the kernel. Steps of the
# loop load two halves and four, behind a guard, or go through block4 at the end.
OUTPUT = """
block0 {
   1 = mov_imm #0
} -> block1

block0 {
   r0 = mov_imm #0
} -> block1 

block1 {
   if_icmp r5, u2, #55d0, n=1
} -> block2 block4  from block0 block5

block2 {
   r1l...r1h = device_load r2:r3, #0, xy, #0, slot 0
   if_icmp r6, u2, #55d0, n=1
} -> block3 block5  from block1

block3 {
   r4l...r5h = device_load r2:r3, #1, xyzw, #0, slot 0
   r6 = convert #11, r4l, #1
   r0 = ffma r6, r1l, r0
   r8:r9 = imad r4.abs, r1.abs, #0, #0
   r8 = imad r4, r1, #0, #0
} -> block5  from block2

block4 {
   r4 = ffma r6, r1l, r0
   r4 = ffma r6, r1l, r0
} -> block5  from block1

block5 {
   r7 = iadd r7, u67, #0
   while_icmp r7, u43, #0, n=1
} -> block1 block6  from block2 block3 block4

block6 {
   stop 
} from block5

block0 {
   r0 = mov_imm #0
   stop 
}
"""
ERRORS = (
    "SHADER-DB:  - MESA_SHADER_COMPUTE shader: 14 inst, 9 alu, 9 fscib, 0 ic, 99 bytes, 143 regs, "
    "126 uniforms, 0 scratch, 704 threads, 1 loops, 2:3 spills:fills"
)


def test_measure():
    found = measure.measure(OUTPUT, ERRORS, 4)
    assert found.pop("step") == {
        "instructions": 10,
        "branches": 3,
        "float": 5,
        "integer": 12,
        "cycles": 12,
        "converts": 1,
        "multiplies_64": 1,
        "multiply_adds": 1,
        "loads": {"32": 1, "64": 1},
        "local_loads": 0,
        "local_stores": 0,
    }
    of_kernel = {"instructions": 14, "registers": 143, "scratch": 0, "threads": 704, "spills": 5}
    assert found == of_kernel | {"work": 4, "blocks": 5}


@pytest.mark.parametrize("said", ["13 inst", "1 inst"])
def test_a_listing_that_is_not_the_whole_kernel_is_an_error(said):
    with pytest.raises(ValueError, match="listings have"):
        measure.measure(OUTPUT, ERRORS.replace("14 inst", said), 4)


def test_code_without_a_loop_is_an_error():
    with pytest.raises(ValueError, match="no loop multiplies"):
        measure.measure(OUTPUT.replace("-> block1 block6", "-> block6"), ERRORS, 4)


@pytest.mark.parametrize(
    "reason, figure, worse",
    [
        ("cycles", 1.1, {"step": {"cycles": 11}}),
        ("threads", 1.23, {"threads": 832}),
        ("64-bit multiply", 1, {"step": {"multiplies_64": 1}}),
        ("branches", 2, {"step": {"branches": 2}}),
        ("spills", 1, {"spills": 1}),
        ("with norm", 1.2, {"norm": 16}),  # a fifth of 10 / 4 cycles, for 32 weights
    ],
)
def test_misses(reason, figure, worse):
    mlx = {"step": {"cycles": 10, "multiplies_64": 0, "branches": 1}, "work": 4, "rows": 1}
    mlx |= {"threads": 1024, "spills": 0, "has_matrices": False}
    ours = mlx | worse | {"step": mlx["step"] | worse.get("step", {})}
    cell = cells.Cell("cell", "ours", "mlx")
    assert report.misses(cell, {"ours": ours, "mlx": mlx}) == {reason: figure}
    assert report.misses(cell, {"ours": mlx, "mlx": mlx}) == {}


def test_tiles_need_as_many_threads_as_those_of_mlx():
    mlx = {"step": {"cycles": 10, "multiplies_64": 0, "branches": 1}, "work": 4, "rows": 1}
    mlx |= {"threads": 1024, "spills": 0, "has_matrices": True}
    cell = cells.Cell("cell", "ours", "mlx")
    assert report.misses(cell, {"ours": mlx | {"threads": 512}, "mlx": mlx}) == {}
    assert report.misses(cell, {"ours": mlx | {"threads": 448}, "mlx": mlx}) == {"threads": 1.14}
    assert report.misses(cell, {"ours": mlx | {"threads": 384}, "mlx": mlx | {"threads": 384}}) == {}


def test_a_norm_is_what_multiplies_before_the_loop():
    jumps = {0: [0, 1], 1: [1, 2], 2: [2, 3], 3: [3, 4], 4: []}
    names = {0: ["ffma"], 1: ["iadd"] * 9, 2: ["fmul"] * 2, 3: ["ffma"] * 8}
    blocks = [
        measure.Block(i, [(name, "") for name in names.get(i, ())], after) for i, after in jumps.items()
    ]
    loop = measure.inner_loop(blocks)
    assert [b.index for b in loop] == [3]
    assert measure.norm_cycles(blocks, loop) == 1 + 2  # not of the loop that only adds, as that over segments
    with pytest.raises(ValueError, match="no loop norms"):
        measure.norm_cycles(blocks[1:2] + blocks[3:], loop)


def test_a_product_of_matrices_costs_what_its_multiply_adds_do():
    kernel = {"step": {"cycles": 100}, "work": 512, "rows": 1, "has_matrices": False}
    assert report.cost(kernel) == 100 / 512
    assert report.cost(kernel | {"has_matrices": True}) == (100 + 512 - 64) / 512  # of each 16, 2 are seen


def test_mended_misses_are_taken_out_and_worse_ones_are_not_let_in(result, monkeypatch, tmp_path):
    monkeypatch.setattr(report, "RESULT", tmp_path / "cost.json")
    monkeypatch.setattr(report, "ACCEPTED", tmp_path / "accepted.txt")
    now = report.all_misses(result["kernels"])
    mended, *_, better, new = now
    (reason, figure), *_ = now[better].items()
    before = {cell: dict(reasons) for cell, reasons in now.items() if cell != new}
    before[mended]["spills"] = 1
    before[better][reason] = round(figure - 0.01, 2)
    report.ACCEPTED.write_text("".join(f"{cell}: {report.text_of(r)}\n" for cell, r in before.items()))
    assert report.write(result["kernels"]) == {better: {reason: figure}, new: now[new]}
    del before[mended]["spills"]
    assert report.accepted() == before


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_put_back_is_seen(name, result):
    mistake = MISTAKES[name]
    assert report.seen(mistake, result["kernels"])
    assert not report.seen(
        replace(mistake, kernel=KERNELS[mistake.right.ours], passes=mistake.right.our_passes),
        result["kernels"],
    )


ONE_BRANCH = [
    name
    for name in KERNELS
    if name.startswith(("projection_rows_1", "projection_rows_4", "projection_rows_normed", *cells.LOW_RANK))
]


@pytest.mark.parametrize("name", ONE_BRANCH)
def test_a_loop_has_no_branch_but_its_own(name):
    """As another compiler has it, at once: the figures are of Mesa's, whoever has that."""
    assert loops.branches(KERNELS[name]) == 1


def test_a_guard_in_a_loop_is_a_branch():
    assert loops.branches(MISTAKES["the loop asks whether a row of the weight exists"].kernel) > 1


METAL_SOURCE = """constant bool flag [[function_constant(0)]];
template <typename T> [[kernel]] void twice(
    const device T* x [[buffer(0)]], device T* y [[buffer(1)]],
    uint3 tile [[threadgroup_position_in_grid]]) {
  threadgroup T block[4][8];
  y[tile.x] = flag ? x[0] : T(float2(1, 2).x + float4(half4(3)).y);
}
template [[host_name("twice_float16")]] [[kernel]] decltype(twice<half>) twice<half>;
"""


def test_translation_keeps_the_lines():
    text = translate(METAL_SOURCE, ["flag"])
    assert text.count("\n") == METAL_SOURCE.count("\n") + 1  # for metal.h
    assert "constant bool flag = 1;" in text and "[[" not in text
    assert "float2{1, 2}.x + to_vector<float4>(to_vector<half4>(3)).y" in text


def test_entry():
    assert kernels(METAL_SOURCE) == {"twice_float16": "twice<half>"}
    text = entry(METAL_SOURCE, "twice<half>", 64, "16")
    assert "void entry(ulong a0, ulong a1, ulong a2, ulong groups)" in text
    assert "twice<half>(Buffer{a0}, Buffer{a1}, uint3{get_group_id(0)," in text
