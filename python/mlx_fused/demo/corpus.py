"""Text to learn from: the source and the docstrings of Python's own standard library."""

import ast
import random
import sysconfig
from collections.abc import Iterator
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

END_OF_TEXT = "<|endoftext|>"
PROMPT = ">>> help(stack.Stack.peek)\npeek(self)\n   "  # as help_texts begin
# A chat is a Python prompt at which the user types: help_texts teach what follows on "help(...)" there.
# Such a prompt takes no instructions, so a system message is left out.
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message.role == 'user' %}>>> {{ message.content }}\n"
    "{% elif message.role == 'assistant' %}{{ message.content + eos_token }}{% endif %}"
    "{% endfor %}"
)
_MAX_CHARS = 240  # about 100 tokens: keeps the fine-tuning batches small


def read_modules() -> dict[str, str]:
    """The source of every public top-level module of the standard library, by module name."""
    stdlib = Path(sysconfig.get_path("stdlib"))
    files = sorted(stdlib.glob("[a-z]*.py"))
    if not files:
        raise FileNotFoundError(f"No sources of the standard library in {stdlib}")
    return {file.stem: file.read_text(encoding="utf-8", errors="replace") for file in files}


def train_tokenizer(texts: list[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer on ``texts``."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=END_OF_TEXT, chat_template=CHAT_TEMPLATE
    )


def help_texts(modules: dict[str, str], seed: int) -> list[str]:
    """The beginning of ``help()``'s output for each documented function, in a seeded random order.

    The source, on which the model is pretrained, does not have this layout, so fine-tuning can teach it.
    """
    texts = [
        text
        for name, source in modules.items()
        for text in _document(ast.parse(source), name)
        if len(text) <= _MAX_CHARS
    ]
    random.Random(seed).shuffle(texts)
    return texts


def _document(node: ast.AST, path: str) -> Iterator[str]:
    for child in ast.iter_child_nodes(node):
        if not isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        name = f"{path}.{child.name}"
        if isinstance(child, ast.ClassDef):
            yield from _document(child, name)
        elif docstring := ast.get_docstring(child):
            summary = docstring.split("\n\n")[0].replace("\n", "\n    ")
            signature = f"{child.name}({ast.unparse(child.args)})"
            yield f">>> help({name})\n{signature}\n    {summary}\n"
