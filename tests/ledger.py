"""What a call costs: launches, dependent stages, and bytes of device memory read and written, ours and MLX's.

Ours are counted by the simulator that runs the call's launch plan. MLX's follow from the graph of the same
call in MLX's own operations and the rules of mlx_kernels.py. ``python tests/ledger.py`` writes the counts
anew, to tests/ledger.json and as tables to docs/design/ledger.md.
"""

import json
from collections import namedtuple
from fractions import Fraction
from functools import lru_cache
from math import ceil
from pathlib import Path

import mlx.core as mx
import numpy as np

import metal_plan
import projections
from mlx_fused._ext import _internals
from mlx_kernels import FORM, Cost, Kernels

GOLDEN = Path(__file__).with_name("ledger.json")
DOCUMENT = Path(__file__).parents[1] / "docs" / "design" / "ledger.md"
DTYPE = mx.bfloat16

# heads is (num_heads, num_kv_heads, head_dim), for the output projection the attention's.
Case = namedtuple("Case", "operation rows hidden heads packed bias")

GQA_8_1, GQA_4_2, RAGGED, LLAMA_1B = (8, 1, 64), (4, 2, 64), (4, 2, 80), (32, 8, 64)
QLORA = ("quantized_lora_qkv", "quantized_lora_output", "quantized_lora_qkv_grad")
RANK = 8  # of adapters, as mlx-lm's default, on all of q, k and v


def small_cases():
    for heads in (GQA_8_1, GQA_4_2):
        for rows in (1, 2, 8, 33, 64, 128):
            yield Case("qkv", rows, 256, heads, False, False)
    for rows in (1, 64):
        for packed, bias in ((False, True), (True, False), (True, True)):
            yield Case("qkv", rows, 256, GQA_4_2, packed, bias)
    for rows in (1, 8, 64):
        for bias in (False, True):
            yield Case("output", rows, 256, GQA_4_2, False, bias)
    # A packed weight's gradient is that of its parts, and a copy that packs them.
    for operation, packed in (("dx", False), ("dx", True), ("dw", False)):
        for rows in (33, 128):
            yield Case(operation, rows, 256, GQA_4_2, packed, True)
    for operation in ("qkv", "output", "dx", "dw"):
        yield Case(operation, 33, 208, RAGGED, False, True)
    for operation in ("lora_qkv", "lora_output", "quantized_qkv", "quantized_output"):
        for rows in (1, 8, 64):
            yield Case(operation, rows, 256, GQA_4_2, False, False)
    for operation in ("lora_qkv_grad", "lora_output_grad", "quantized_qkv_grad", *QLORA):
        yield Case(operation, 64, 256, GQA_4_2, False, False)
    for operation in ("gated", "quantized_gated"):
        for rows in (1, 8, 64):
            yield Case(operation, rows, 256, GQA_4_2, False, False)


def large_cases():
    for operation in ("qkv", "output"):
        for rows in (1, 8, 512):
            yield Case(operation, rows, 2048, LLAMA_1B, False, operation == "output")
    yield Case("dx", 512, 2048, LLAMA_1B, False, False)
    yield Case("dw", 512, 2048, LLAMA_1B, False, False)
    for operation in ("lora_qkv", "lora_output", "quantized_qkv", "quantized_output"):
        for rows in (1, 512):
            yield Case(operation, rows, 2048, LLAMA_1B, False, False)
    for operation in ("lora_qkv_grad", "lora_output_grad", "quantized_qkv_grad", *QLORA):
        yield Case(operation, 512, 2048, LLAMA_1B, False, False)
    for operation in ("gated", "quantized_gated"):
        for rows in (1, 512):
            yield Case(operation, rows, 2048, LLAMA_1B, False, False)


SIMULATED = list(small_cases())
PLANNED = list(large_cases())  # of Llama-3.2-1B's sizes, which would take the simulator hours


# Ours


def run_plan(case, **options):
    """The case's call, its plan run."""
    op = call_of(case)
    if not (keys := wanted_of(case, op)):
        return metal_plan.forward(op, **options)[0]
    return metal_plan.backward(op, projections.cotangents(None, op, zeros), keys, **options)[0]


def wanted_of(case, op):
    """What it is the gradient of, if it is one."""
    wanted = {"dx": ("input",), "dw": ("weight", "bias")}
    trained = ("input", "x", "lora_a", "lora_b") if case.operation.endswith("grad") else ()
    return [key for key in op.leaves if key[0] in wanted.get(case.operation, trained)]


def bound(launch):
    """The names of its buffers by what the kernel has them for."""
    names = {}
    for index, name, _ in launch["buffers"]:
        _, role = max((first, role) for role, first in metal_plan.BUFFERS.items() if first <= index)
        names.setdefault(role, []).append(name)
    return names


def reads(launch, case):
    """How often the launch reads each of its inputs, as its tiling implies: {buffer: times}.

    A tile of the output needs its rows of the one operand and its columns of the other, each in full.
    """
    columns, row_tiles, batches = launch["grid"]
    kernel, constants, rows = launch["kernel"], launch["constants"], case.rows
    op = call_of(case)
    features, in_features = op.features, op.x.shape[-1]
    if kernel.startswith("low_rank_product"):
        tile_rows = 8 * int(kernel.removeprefix("low_rank_product_")[0])  # surplus rows repeat the last
        times = {"left": Fraction(row_tiles * tile_rows, rows), "lora": row_tiles}
    elif kernel.startswith("adapter_grad"):
        # A tile of 32 features reads the rows of P or G.
        of_x = columns == ceil(in_features / 32)
        tiles = [in_features / 32] if of_x else [n / 32 for n in features]
        times = {"left": 1, "low_rank": Fraction(sum(map(ceil, tiles)), len(tiles))}
    elif kernel.startswith("projection_rows"):
        times = {"input": columns * launch["threadgroup"][0] // 32, "weight": row_tiles}
    elif kernel.startswith("projection"):
        times = {"input": columns, "weight": row_tiles * batches}
    elif kernel.startswith("input_grad"):
        times = {"gradient": columns, "weight": row_tiles * batches}
    else:
        times = {"input": row_tiles, "gradient": columns}
    if constants.get(metal_plan.CONSTANTS["has_bias"]):
        times["bias"] = rows  # by every element of the output
    if constants.get(metal_plan.CONSTANTS["has_residual"]):
        times["residual"] = 1
    if constants.get(metal_plan.CONSTANTS["has_adapter"]):  # P or G, and the adapters' other factors
        if kernel.startswith("projection_rows"):  # by every element of the output
            times |= {"low_rank": Fraction(sum(features), len(features)), "lora": rows}
        elif kernel.startswith("projection"):  # by two of a tile's four simdgroups
            times |= {"low_rank": Fraction(2 * columns, len(features)), "lora": 2 * row_tiles}
        else:
            times |= {"low_rank": 2 * columns, "lora": 2 * row_tiles}
    if launch["format"] != "dense":  # once for every 16 values of their group
        times["scales"] = times["biases"] = times["weight"] * FORM[1] // 16
    names = bound(launch)
    return {name: n for role, n in times.items() for name in names[role]}


def written(call, launch):
    """The buffers that the launch writes: outputs, and temporaries that no launch before it has."""
    earlier = call.plan[: call.plan.index(launch)]
    known = {name for other in earlier for _, name, _ in other["buffers"]}
    names = {name for _, name, _ in launch["buffers"]}
    return names & {*call.outputs} | {name for name in names - known if name.startswith("temporary")}


def stages(call, case):
    """Launches on the longest chain of those that need another's result."""
    done = {}
    for launch in call.plan:
        stage = 1 + max(done.get(name, 0) for name in reads(launch, case))
        done |= dict.fromkeys(written(call, launch), stage)
    return max(done.values())


def simulated(case) -> Cost:
    """Counted while the launches ran."""
    call = run_plan(case)
    traffic = [t for result in call.results for t in result.traffic.values()]
    totals = (sum(getattr(t, field) for t in traffic) for field in Cost._fields[2:])
    return Cost(len(call.plan), stages(call, case), *totals)


class NotRun:
    """In place of a library, when it is only the plan that is wanted."""

    def __getitem__(self, kernel):
        return self

    def run(self, launches, buffers):
        return None


def planned(case) -> Cost:
    """The same by `reads`, which tests hold against the simulator."""
    call = run_plan(case, library_of=NotRun())
    size = {name: buffer.nbytes for name, buffer in call.buffers.items()}
    times = [item for launch in call.plan for item in reads(launch, case).items()]
    bytes_written = sum(size[a] for launch in call.plan for a in written(call, launch))
    distinct_read, total_read = sum(size[a] for a, _ in times), int(sum(size[a] * n for a, n in times))
    return Cost(len(call.plan), stages(call, case), distinct_read, bytes_written, total_read, bytes_written)


# MLX's


def zeros(rng, shape, dtype=DTYPE):
    return mx.zeros(shape, dtype)


@lru_cache(maxsize=1)  # one is asked for several times on end
def call_of(case):
    """The call of projections.py that a case is."""
    rng, rank = np.random.default_rng(0), RANK if "lora" in case.operation else None
    form = FORM if "quantized" in case.operation else None
    options = {"bias": case.bias, "dtype": DTYPE, "draw": zeros, "form": form}
    if "output" in case.operation:
        shape = (1, case.rows, case.heads[0] * case.heads[2], case.hidden)
        return projections.output(rng, *shape, rank=rank, **options)
    if "gated" in case.operation:
        return projections.gated(rng, 1, case.rows, case.hidden, 4 * case.hidden, **options)
    shape = (1, case.rows, case.hidden, case.heads)
    return projections.qkv(rng, *shape, ranks=rank and (rank,) * 3, packed=case.packed, **options)


def stock(op):
    """As mlx-lm's models compute it, with nn.Linear, nn.QuantizedLinear or LoRALinear."""
    a = op.arguments
    if op.packed:
        packed = linear(op.x, a["weight"], a["bias"])
        outputs = mx.split(packed, np.cumsum(op.features)[:-1].tolist(), -1)
    else:
        names = ("weight", "bias", "scales", "biases", "lora_a", "lora_b")
        layers = zip(*map(op.parts, names), strict=True)
        outputs = [linear(op.x, *layer, a.get("lora_scale")) for layer in layers]
    if op.gated:
        return (gated(*outputs),)
    if not op.segments:
        return (a["residual"] + outputs[0],)
    shape = (*op.x.shape[:2], -1, a["head_dim"])
    return tuple(y.reshape(shape).transpose(0, 2, 1, 3) for y in outputs)


def gated(gate, up):
    """In place of the compiled activation, or of ours by itself: a launch that reads and writes as much."""
    return gate * up


def linear(x, weight, bias, scales=None, biases=None, lora_a=None, lora_b=None, lora_scale=None):
    if scales is None:
        y = x @ weight.T if bias is None else mx.addmm(bias, x, weight.T)
    else:
        y = mx.quantized_matmul(x, weight, scales, biases, group_size=FORM[1], bits=FORM[2])
        y = y if bias is None else y + bias
    return y if lora_a is None else y + (lora_scale * ((x @ lora_a) @ lora_b)).astype(x.dtype)


def composed(op, wanted=(), given=()):
    """As routing composes it: its outputs, or the gradients by the arrays ``wanted``."""
    inputs = {("input", 0): op.x, ("residual", 0): op.arguments.get("residual")}
    inputs |= {("cotangent", i): g for i, g in enumerate(given)}
    for name in ("weight", "scales", "biases", "bias", "lora_a", "lora_b"):
        role = metal_plan.ROLES.get(name, name)
        inputs |= {(role, i): part for i, part in enumerate(op.parts(name))}
    heads = [n for n, _ in op.segments] if op.segments else [0] * len(op.features)
    scale = op.arguments.get("lora_scale")
    segments = [(*sizes, scale) for sizes in zip(op.features, heads, strict=True)]
    group_size, bits, mode = op.quantization or (None,) * 3
    outputs = tuple(
        _internals.composed(
            {slot: a for slot, a in inputs.items() if a is not None},
            segments,
            [(metal_plan.ROLES.get(name, name), place or 0) for name, place in wanted],
            (mode, bits, group_size) if mode else None,
        )
    )
    return (gated(*outputs),) if op.gated else outputs


def model(op, wanted=(), given=()):
    """As mlx-lm's models have it."""
    if not wanted:
        return stock(op)
    of_wanted = lambda *v: stock(op.with_leaves(dict(zip(wanted, v, strict=True))))  # noqa: E731
    return tuple(mx.vjp(of_wanted, [op.leaves[key] for key in wanted], given)[1])


FORMS = {"composed": composed, "mlx-lm": model}


def graph(case, form):
    """The nodes of the case's graph, in the order of their evaluation, as `mx.export_function` has them."""
    op = call_of(case)
    wanted = wanted_of(case, op)
    given = projections.cotangents(None, op, zeros) if wanted else ()

    def run(*arrays):
        leaves, cotangents = arrays[: len(op.leaves)], list(arrays[len(op.leaves) :])
        return FORMS[form](op.with_leaves(dict(zip(op.leaves, leaves, strict=True))), wanted, cotangents)

    nodes = []
    mx.export_function(nodes.append, run, *op.leaves.values(), *given)
    return nodes


# The tables


def costs(case) -> dict[str, Cost]:
    ours = (simulated if case in SIMULATED else planned)(case)
    return {"ours": ours} | {form: Kernels(graph(case, form)).cost() for form in FORMS}


def count():
    """A row for each case: what it is, and the cost of each form."""
    return [{"case": case} | costs(case) for case in SIMULATED + PLANNED]


def to_json(rows):
    return "[\n" + ",\n".join(map(json.dumps, rows)) + "\n]\n"


ADAPTED = {
    "lora_qkv": "QKV, LoRA",
    "lora_output": "output + residual, LoRA",
    "lora_qkv_grad": "QKV, LoRA: dX, dA, dB",
    "lora_output_grad": "output, LoRA: dX, dA, dB",
    "quantized_qkv": "QKV, 4 bits",
    "quantized_output": "output + residual, 4 bits",
    "quantized_qkv_grad": "QKV, 4 bits: dX",
    "quantized_lora_qkv": "QKV, 4 bits, LoRA",
    "quantized_lora_output": "output + residual, 4 bits, LoRA",
    "quantized_lora_qkv_grad": "QKV, 4 bits, LoRA: dX, dA, dB",
    "gated": "gate and up, activation",
    "quantized_gated": "gate and up, activation, 4 bits",
}
OPERATIONS = {"qkv": "QKV", "output": "output + residual", "dx": "QKV: dX", "dw": "QKV: dW, dbias"} | ADAPTED
COLUMNS = ("operation", "M", "hidden", "heads", "weights", "bias", "form")
COLUMNS += ("launches", "stages", "read", "read in all", "written", "written in all")
HEADER = f"| {' | '.join(COLUMNS)} |\n|{'---|' * 7}{'--:|' * 6}\n"


def routed(case):
    op = call_of(case)
    wanted = [metal_plan.ROLES.get(name, name) for name, _ in wanted_of(case, op)]
    group_size, bits, mode = op.quantization or (None,) * 3
    route = _internals.route(
        next((n for n in ("output", "gated") if n in case.operation), "qkv") + ("_grad" if wanted else ""),
        [DTYPE],
        case.rows,
        op.x.shape[-1],
        case.bias,
        quantization=(mode, bits, group_size) if mode else None,
        rank=RANK if "lora" in case.operation else 0,
        wanted=wanted,
        features=op.features,
        device="metal",
    )
    return "ours" if route == "fused" else "composed"


def table(cases, rows, unit):
    lines = []
    for case, row in zip(cases, rows, strict=True):
        what = [OPERATIONS[case.operation], case.rows, case.hidden, "{}:{} of {}".format(*case.heads)]
        what += ["packed" if case.packed else "separate", "yes" if case.bias else "no"]
        taken = routed(case)
        forms = {}  # those that cost the same on one line
        for form in ("ours", *FORMS):
            forms.setdefault(Cost(*row[form]), []).append(f"**{form}**" if form == taken else form)
        for cost, names in forms.items():
            sizes = (cost.distinct_read, cost.total_read, cost.distinct_written, cost.total_written)
            numbers = [f"{size / unit:,.1f}" for size in sizes]
            lines.append([*what, ", ".join(names), cost.launches, cost.stages, *numbers])
            what = [""] * len(what)
    return HEADER + "".join(f"| {' | '.join(map(str, line))} |\n" for line in lines)


def with_tables(text, rows):
    """The document, its tables those of the rows."""
    few = len(SIMULATED)
    tables = table(SIMULATED, rows[:few], 1 << 10), table(PLANNED, rows[few:], 1 << 20)
    for name, new_table in zip(("simulated", "planned"), tables, strict=True):
        head, begin, tail = text.partition(f"<!-- {name} -->\n")
        _, end, tail = tail.partition("<!-- end -->\n")
        text = head + begin + new_table + end + tail
    return text


def main():
    mx.set_default_device(mx.cpu)
    rows = count()
    GOLDEN.write_text(to_json(rows))
    DOCUMENT.write_text(with_tables(DOCUMENT.read_text(), rows))


if __name__ == "__main__":
    main()
