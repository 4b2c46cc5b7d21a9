"""Generates the same text with a stock and a patched model, side by side.

python examples/generate.py [MODEL] [PROMPT]
"""

import sys

import mlx_lm

import mlx_fused

path = sys.argv[1] if len(sys.argv) > 1 else "mlx_fused_demo/model-4bit"
prompt = sys.argv[2] if len(sys.argv) > 2 else "def main(args):\n"
model, tokenizer = mlx_lm.load(path)


def generate():
    responses = list(mlx_lm.stream_generate(model, tokenizer, prompt, max_tokens=48))
    return "".join(response.text for response in responses), responses[-1]


def show(name, text, last):
    print(f"--- {name}: {last.prompt_tps:.0f} tokens/s read, {last.generation_tps:.0f} tokens/s written")
    print(prompt + text)


generate()  # the first one warms up
stock, last = generate()
show("stock", stock, last)
with mlx_fused.patched(model) as report:
    patched, last = generate()
show("patched", patched, last)

print("---")
print(report.summary)
print("same text" if stock == patched else "the texts differ: two tokens were almost equally likely")
