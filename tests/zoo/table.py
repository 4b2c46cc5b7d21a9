"""docs/models.md: what patching does to every model of mlx-lm."""

import re
from pathlib import Path

from mlx_lm.utils import MODEL_REMAPPING

from zoo import configs, parity

DOCUMENT = Path(__file__).parents[2] / "docs" / "models.md"
MLX_LM = "0.32.2"  # the version that the document is about

_PARTS = tuple(parity.LABELS)
_COLUMNS = ("model", *parity.LABELS.values(), *parity.MEASURES, "what is not fused or compared")
_NO_NUMBER = "-"

_PAGE = """# Models

What [`mlx_fused.patch`](patching.md) does to the models of mlx-lm {mlx_lm}.

## Is my model covered?

The report of `patch` says it, layer by layer, with the reason for what is not fused:

```python
import mlx_fused, mlx_lm

model, tokenizer = mlx_lm.load("mlx-community/Qwen3-0.6B-4bit")
print(mlx_fused.patch(model))
```

Without loading the model: look here for the `model_type` of its `config.json`. What is not fused runs
mlx-lm's own code. {unknown} could not be run here.

{families}

## Every model

{summary}

- **q, k, v**: in how many attention layers these projections were one operation, at every call.
  **attention**: in how many attention itself was. **MLP**: in how many MLPs, shared experts among them, the
  layers before the last one were one operation with the activation. **output**: in how many of both the last
  projection and the residual were one operation. **others**: in how many modules every other linear layer
  ran on our operation. **norms**: how many of MLX's RMS norms ran on our operation. **experts**: of a mixture
  of experts; these are MLX's gathered products. **loss**: whether
  [`cross_entropy_loss`](patching.md#the-loss) makes the loss without logits.
- What is none of these, such as norms of classes of a model's own, runs as in mlx-lm.
- The numbers are the largest error of the patched model's results, as a part of the largest value, and in
  parentheses the stock model's. Both are rounding ([the bound](#the-bound)).

{table}

mlx-lm runs some model types with the code of another, which is the one in this table:
{aliases}.

No models of their own: {helpers}.

## How this was measured

`make models` writes this page, here with {versions}.
The tests (`tests/test_parity.py`) measure every model anew and hold the page to what they find.

- The models are tiny: what each file of `mlx_lm/models` makes of one table of sizes (`tests/zoo/configs.py`),
  {layers} layers of 64 dimensions with random float32 parameters.
- **logits**: of {batch} sequences of {length} tokens at once, and again with a cache, {prompt} tokens and
  then one by one. **gradients**: of `cross_entropy_loss`, which is MLX's own loss unless the model is
  patched, for all parameters.
- **QLoRA**: the same model in 4 bits by groups of {group}, with adapters of rank {rank} on all linear layers
  of its blocks; the gradients are those of the adapters.
- Every token goes to every expert, so that no choice hangs on the last bit. Where a model's code wants fewer
  (llama4) or its attention chooses among keys, another choice would show as an error far beyond rounding.

## The bound

Both errors are differences from the same model with exact layers: its linear layers, RMS norms and attention
compute in float64 and round once, and the rest of its code runs as it is. The patched model's may be at most
{factor} times the stock model's. The roundings of the two are independent and of one size, and the model
amplifies both alike. Where it does so much, as recurrent layers do, both are large.
"""

# Families that users know, by how the names of their models begin; any other model is among the last row's.
_FAMILIES = {
    "Cohere": ("cohere",),
    "DeepSeek": ("deepseek",),
    "ERNIE": ("ernie",),
    "EXAONE": ("exaone",),
    "Gemma": ("gemma",),
    "GLM": ("glm",),
    "GPT": ("gpt",),
    "Granite": ("granite",),
    "Hunyuan": ("hunyuan",),
    "Kimi": ("kimi",),
    "LFM": ("lfm",),
    "Llama": ("llama",),
    "MiniCPM": ("minicpm",),
    "MiniMax": ("minimax",),
    "Mistral": ("mistral", "ministral", "mixtral", "pixtral"),
    "Nemotron": ("nemotron",),
    "OLMo": ("olmo",),
    "Phi": ("phi",),
    "Qwen": ("qwen",),
    "others": ("",),
}
_COVERAGES = (
    *("every part", "all but some residuals", "all but experts", "all but experts, some residuals"),
    *("some parts or layers", "nothing"),
)
_MISSING = ({}, {"residual"}, {"experts"}, {"experts", "residual"})  # of the first of these


def row(result):
    """The row of one model, as text."""
    notes = [result.reason, *result.obstacles]
    numbers = []
    for measure in parity.MEASURES:
        errors = result.errors.get(measure, "")
        if isinstance(errors, str):
            notes.append(errors and f"mlx-lm's own code fails: {errors}")
            numbers.append(_NO_NUMBER)
        else:
            numbers.append("{:.0e} ({:.0e})".format(*errors))
    counts = [_one(result.counts[part]) for part in _PARTS]
    return (f"`{result.name}`", *counts, *numbers, "; ".join(filter(None, dict.fromkeys(notes))))


def _one(counts):
    """Those of dense and, if not as many are left out of them, of quantized weights, which add embeddings."""
    left_out = {of - fused for fused, of in map(_dense, counts)}
    return ", QLoRA ".join(counts if len(left_out) > 1 else counts[:1]) or _NO_NUMBER


def coverage(row):
    """A row without its numbers, which differ from machine to machine."""
    return [re.sub(r"^\d+e-\d+ \(\d+e-\d+\)$", "number", cell) for cell in row]


def read():
    """The document's rows by the names of the models, and what it says it was written with."""
    text = DOCUMENT.read_text()
    rows = [tuple(line[2:-2].split(" | ")) for line in text.splitlines() if line.startswith("| `")]
    return {row[0].strip("`"): row for row in rows}, re.search("here with (.*)[.]", text)[1]


def page(rows, versions):
    """The document of these rows."""
    alignment = ("---", *["--:"] * (len(_COLUMNS) - 2), "---")
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
        factor=parity.FACTOR,
        unknown=", ".join(f"`{name}`" for name, row in rows.items() if _coverage_of(row) is None),
        families=_families(rows),
        aliases=", ".join(f"`{name}` (`{target}`)" for name, target in sorted(_aliases(rows).items())),
        summary=_summary(rows.values()),
        table=_table(lines),
        helpers=", ".join(f"`{name}`" for name in configs.names() if name not in rows),
    )


def _table(lines):
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _aliases(rows):
    """The model types for which mlx-lm takes the code of another."""
    return {name: target for name, target in MODEL_REMAPPING.items() if target in rows}


def _families(rows):
    """Which models of each family are covered, and how far."""
    cells = {family: {coverage: [] for coverage in _COVERAGES} for family in _FAMILIES}
    of_types = {name: name for name in rows} | _aliases(rows)
    for name in sorted(of_types, key=str.lower):
        if coverage := _coverage_of(rows[of_types[name]]):
            family = next(f for f, beginnings in _FAMILIES.items() if name.startswith(beginnings))
            cells[family][coverage].append(f"`{name}`")
    header = [("family", *_COVERAGES), ["---"] * (1 + len(_COVERAGES))]
    return _table([*header, *([family, *map(", ".join, of.values())] for family, of in cells.items())])


def _coverage_of(row):
    """How much of a model is fused; None if it does not run here."""
    if row[1] == _NO_NUMBER:
        return None
    counts = dict(zip(_PARTS, (_dense(cell) for cell in row[1:]), strict=False))
    if not any(fused for fused, _ in counts.values()):
        return "nothing"
    missing = {part for part, (fused, all) in counts.items() if fused < all}
    if "linear" not in missing:
        missing.discard("qkv")  # they are other linear layers, or one for all three
    missing.discard("loss")  # of training alone
    named = [coverage for coverage, of in zip(_COVERAGES, _MISSING, strict=False) if missing == set(of)]
    return named[0] if named else "some parts or layers"


def _dense(cell):
    """Fused, and all, of dense weights."""
    return tuple(map(int, re.findall(r"\d+", cell)[:2]))


def _summary(rows):
    compared = [row for row in rows if row[1 + len(_PARTS)] != _NO_NUMBER]
    texts = []
    for column, label in enumerate(parity.LABELS.values(), 1):
        fused, all = map(sum, zip(*(_dense(row[column]) for row in compared), strict=True))
        texts.append(f"{label} {fused} of {all}")
    return f"{len(compared)} of {len(rows)} models are compared. Fused in them: {'; '.join(texts)}."
