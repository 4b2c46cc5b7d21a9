"""docs/models.md: what patching does to every model of mlx-lm."""

import re
from pathlib import Path

from zoo import configs, parity

DOCUMENT = Path(__file__).parents[2] / "docs" / "models.md"
MLX_LM = "0.32.2"  # the version that the document is about

_COLUMNS = ("model", "q, k, v", "output + residual", *parity.MEASURES, "what is not fused or compared")
_NO_NUMBER = "-"

_PAGE = """# Models

What [`mlx_fused.patch`](patching.md) does to every model of mlx-lm {mlx_lm}, and how far the patched model's
results are from the stock model's. `make models` writes this page, here with {versions}.
The tests (`tests/test_parity.py`) measure every model anew and hold the page to what they find.

- The models are tiny: what each file of `mlx_lm/models` makes of one table of sizes (`tests/zoo/configs.py`),
  {layers} layers of 64 dimensions with random float32 parameters.
- **q, k, v** and **output + residual**: in how many attention layers these projections were one operation, at
  every call.
- **logits**: of {batch} sequences of {length} tokens at once, and again with a cache, {prompt} tokens and
  then one by one. **gradients**: of a cross-entropy loss, for all parameters.
- **QLoRA**: the same model in 4 bits by groups of {group}, with adapters of rank {rank} on all linear layers
  of its blocks; the gradients are those of the adapters.
- The numbers are the largest difference as a part of the stock model's largest value. Allowed is
  {tolerance:.1e}, which is 2u (8L sqrt(K) + sqrt(24L)) with u = 2^-24, L = {layers} layers and K = {widest}
  terms in the longest sum: a sum of K products in float32 is off by 8u sqrt(K) at most, some 12 roundings in
  a layer, there and back, add up as squares, and either model may be off.
- Every token goes to every expert, so that no choice hangs on the last bit. Where a model's code wants fewer
  (llama4) or its attention chooses among keys, another choice would show as a difference far beyond that.

{summary}

{table}

No models of their own: {helpers}.
"""


def row(result):
    """The row of one model, as text."""
    notes = [result.reason, *result.obstacles]
    if not result.reason and result.qkv[0] == "0 of 0":
        notes.append("no attention layer found")
    numbers = []
    for measure in parity.MEASURES:
        value = result.differences.get(measure, "")
        if isinstance(value, str):
            notes.append(value and f"mlx-lm's own code fails: {value}")
        numbers.append(_NO_NUMBER if isinstance(value, str) else f"{value:.0e}" if value else "0")
    counts = (_one(result.qkv), _one(result.output))
    return (f"`{result.name}`", *counts, *numbers, "; ".join(filter(None, dict.fromkeys(notes))))


def _one(counts):
    """Those of dense and of quantized weights, in few words."""
    return ", QLoRA ".join(dict.fromkeys(counts)) or _NO_NUMBER


def coverage(row):
    """A row without its numbers, which differ from machine to machine."""
    return [re.sub(r"^(0|\d+e-\d+)$", "number", cell) for cell in row]


def read():
    """The document's rows by the names of the models, and what it says it was written with."""
    text = DOCUMENT.read_text()
    rows = [tuple(line[2:-2].split(" | ")) for line in text.splitlines() if line.startswith("| `")]
    return {row[0].strip("`"): row for row in rows}, re.search("here with (.*)[.]", text)[1]


def page(rows, versions):
    """The document of these rows."""
    alignment = ("---", "--:", "--:", *["--:"] * len(parity.MEASURES), "---")
    lines = [_COLUMNS, alignment, *(rows[name] for name in sorted(rows, key=str.lower))]
    return _PAGE.format(
        mlx_lm=MLX_LM,
        versions=versions,
        layers=configs.LAYERS,
        batch=parity.BATCH,
        length=parity.PROMPT + parity.STEPS,
        prompt=parity.PROMPT,
        group=configs.GROUP,
        rank=configs.RANK,
        tolerance=parity.TOLERANCE,
        widest=configs.WIDEST,
        summary=_summary(rows.values()),
        table="\n".join(f"| {' | '.join(line)} |" for line in lines),
        helpers=", ".join(f"`{name}`" for name in configs.names() if name not in rows),
    )


def _summary(rows):
    compared = [row for row in rows if row[3] != _NO_NUMBER]
    totals = []
    for column in (1, 2):
        dense = [map(int, re.findall(r"\d+", row[column])[:2]) for row in compared]
        totals.append(tuple(map(sum, zip(*dense, strict=True))))
    (qkv, layers), (output, _) = totals
    return (
        f"{len(compared)} of {len(rows)} models are compared. Of their {layers} attention layers, q, k and\n"
        f"v are one operation in {qkv}, the output projection and the residual in {output}."
    )
