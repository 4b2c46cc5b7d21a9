"""Address spaces of the Metal kernels, by a compiler that knows them and by the lint."""

import re
import shutil

import pytest

import mutation
from metal_cost.address_spaces import errors
from metal_cost.cells import HERE, KERNELS, METAL
from metal_cost.translate import kernels
from msl_sim import lint
from msl_sim.mutate import Mutant, judge
from msl_sim.toolchain import flatten

SOURCES = sorted(METAL.glob("*.metal"))
SPACES = ("device", "threadgroup", "constant", "thread")
# Instances of the kernels that have every line of the templates in them.
INSTANCE = re.compile(
    r"(?!projection_rows_(?:[248]|normed_[124]))(?:.*_(?:dense|affine_4|mxfp4|splits)|weight_grad"
    r"|low_rank_product_4x3|adapter_grad_3|activation(?:_grad)?)_float16"
)


def functions_of(text):
    return [function for name, function in kernels(text).items() if INSTANCE.fullmatch(name)]


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.stem)
def test_our_kernels(path):
    text = flatten(path)
    assert functions_of(text) and errors(text, functions_of(text)) == []


@pytest.mark.parametrize("path", sorted(HERE.glob("*.metal")), ids=lambda path: path.stem)
def test_mlx_kernels(path):
    assert errors(flatten(path), [k.function for k in KERNELS.values() if k.source == path]) == []


KERNEL = """struct Sum {{
  float value;
  METAL_FUNC float twice() thread {{ return 2.0f * value; }}
}};
METAL_FUNC float first(const device float* x) {{ return x[0]; }}
template <typename T>
[[kernel]] void k(
    const device T* x [[buffer(0)]], device T* y [[buffer(1)]], constant Sum& s [[buffer(2)]]) {{
  threadgroup float t[32];
  thread Sum sum = {{x[0]}};
  t[0] = sum.twice();
  {}
}}
template [[host_name("k")]] [[kernel]] decltype(k<float>) k<float>;
"""


@pytest.mark.parametrize(
    "wrong, right",
    [
        ("device float* p = t;", "threadgroup float* p = t;"),
        ("thread float* p = y;", "device float* p = y;"),
        ("threadgroup float* p = &sum.value;", "thread float* p = &sum.value;"),
        ("device float& r = t[0];", "threadgroup float& r = t[0];"),
        ("const device Sum* p = &s;", "constant Sum* p = &s;"),
        ("y[0] = first(t);", "y[0] = first(x);"),
        ("y[0] = s.twice();", "y[0] = sum.twice();"),
        ("s.value = x[0];", "sum.value = x[0];"),
        ("t[0] = *(thread float*)y;", "t[0] = *(device float*)y;"),
    ],
)
def test_a_violation_is_seen_at_its_line(tmp_path, wrong, right):
    path = tmp_path / "k.metal"
    path.write_text(KERNEL.format(wrong))
    line = KERNEL.format(wrong).split("\n").index(f"  {wrong}") + 1
    assert {where for where, _ in errors(flatten(path), ["k<float>"])} == {f"own/k.metal:{line}"}
    path.write_text(KERNEL.format(right))
    assert errors(flatten(path), ["k<float>"]) == []


def mutants():
    """Every address space in our sources, as each of the others and left out."""
    for path in [*sorted(METAL.glob("*.h")), *SOURCES]:
        text = re.sub(r'//[^\n]*|"[^"\n]*"', lambda m: " " * len(m[0]), path.read_text())
        for word in re.finditer(rf"\b(?:{'|'.join(SPACES)})\b", text):
            line = text.count("\n", 0, word.start()) + 1
            for new in (*SPACES, ""):
                if new != word[0]:
                    name = f"{path.name}:{line} {word[0]} to {new or 'none'}"
                    yield Mutant(name, path.name, word.start(), word[0], new)


def is_seen(mutant, folder):
    shutil.copytree(METAL, folder, dirs_exist_ok=True)
    mutant.apply(folder)
    for path in SOURCES:
        text = flatten(folder / path.name)
        if f'"own/{mutant.file}"' in text and (lint.check(text) or errors(text, functions_of(text))):
            return True
    return False


MUTANTS = list(mutants())
# An array that each thread has its own of is right as far as a compiler can tell.
PRIVATE = [m for m in MUTANTS if m.file == "low_rank_product.metal" and m.old == "threadgroup"]
PRIVATE = [m for m in PRIVATE if m.new in ("thread", "")]


# Each address space has 4 mutants; in steps of 35 there are some of every kind.
@pytest.mark.parametrize("mutant", MUTANTS[::35], ids=lambda m: m.name)
def test_a_mutant_is_seen(tmp_path, mutant):
    assert is_seen(mutant, tmp_path / "metal") or mutant in PRIVATE


@pytest.mark.slow
def test_all_mutants_are_seen(tmp_path):
    assert [m for i, m in enumerate(MUTANTS) if not is_seen(m, tmp_path / str(i))] == PRIVATE


@pytest.mark.slow
@pytest.mark.parametrize("mutant", PRIVATE, ids=lambda m: m.name)
def test_the_simulator_sees_an_array_that_is_private(mutant):
    assert judge(METAL, mutant, mutation.low_rank_product).killed
