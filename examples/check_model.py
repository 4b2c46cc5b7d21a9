"""Compares one's own checkpoint, stock and patched: results, and tokens per second.

python examples/check_model.py [MODEL]

`mlx-fused validate MODEL` checks far more thoroughly that results are right; this is the idea in forty lines.
"""

import sys
import time
from statistics import median

import mlx.core as mx
import mlx_lm
from mlx_lm.models.cache import make_prompt_cache

import mlx_fused

PROMPT_TOKENS, NEW_TOKENS, TURNS = 64, 16, 5

path = sys.argv[1] if len(sys.argv) > 1 else "mlx_fused_demo/model-4bit"
model, tokenizer = mlx_lm.load(path)
prompt = mx.array([(tokenizer.encode("The quick brown fox. ") * PROMPT_TOKENS)[:PROMPT_TOKENS]])


def run():
    """Logits of the prompt, and the tokens per second of reading it and of writing."""
    cache = make_prompt_cache(model)
    start = time.perf_counter()
    logits = model(prompt, cache)
    mx.eval(logits)
    between = time.perf_counter()
    last = logits
    for _ in range(NEW_TOKENS):
        last = model(mx.argmax(last[:, -1:], axis=-1), cache)
        mx.eval(last)
    end = time.perf_counter()
    return logits, PROMPT_TOKENS / (between - start), NEW_TOKENS / (end - between)


runs = {"stock": [], "patched": []}
for _ in range(1 + TURNS):  # in turns, so that changes of the machine's speed affect both
    runs["stock"].append(run())
    with mlx_fused.patched(model) as report:
        runs["patched"].append(run())

print(report)
(stock, *_), (patched, *_) = runs["stock"][0], runs["patched"][0]
difference = mx.linalg.norm((patched - stock).astype(mx.float32)) / mx.linalg.norm(stock.astype(mx.float32))
print(f"logits differ by {difference.item():.0e} of their size ({stock.dtype})")
for i, what in enumerate(("reading the prompt", "writing"), start=1):
    a, b = (median(run[i] for run in runs[name][1:]) for name in ("stock", "patched"))  # the first warms up
    print(f"{what:20}{a:8.0f} tokens/s stock {b:8.0f} patched {b / a:8.2f} x")
