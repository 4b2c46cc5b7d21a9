"""The commands in the pages of documentation. ``python doc_commands.py PAGE`` runs those of a page.

It runs every block of Python and shell in order, in the current folder, and stops at the first that fails.
Blocks of Python share their variables; ``>>>`` in them must print what the page says. Shell commands run as
they are written, except for those in ``INSTEAD``. The environment has the repository's path in ``ROOT`` and a
free port in ``PORT``.
"""

import doctest
import os
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from markdown_it import MarkdownIt

ROOT = Path(__file__).parent.parent
PAGES = [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("examples/**/*.md")]
INPUT = "help(os.close)\nr\nq\n"  # on stdin: what is typed at a chat


@dataclass(frozen=True)
class Block:
    language: str  # what is written behind the backquotes
    line: int  # of the page
    text: str

    def commands(self) -> list[str]:
        """The lines of shell: continued ones as one, without comments."""
        lines = self.text.replace("\\\n", " ").splitlines()
        return [re.sub(r"(^|\s+)#.*", "", line) for line in lines]


@dataclass(frozen=True)
class Instead:
    """What is run instead of commands that cannot run in a test as they are written."""

    pattern: str  # of a whole command
    run: str | Callable[[re.Match], str]  # as ``re.sub`` takes it
    reason: str


INSTEAD = (
    Instead(r"make (.*)", r'make -C "$ROOT" --dry-run \1', "takes minutes: is there a target?"),
    Instead(
        r"mlx-fused demo.*",
        r"\g<0> --help",
        "takes minutes, tests/test_demo.py runs it: are there such options?",
    ),
    Instead(
        r"(?:\S*/)?python benchmarks/(bench|loss|memory|models|sdpa).py(.*)",
        r'python "$ROOT"/benchmarks/\1.py\2 --help',
        "takes minutes, tests/test_bench*.py run it: are there such options?",
    ),
    Instead(
        r"mlx-fused tune(?! --remove).*",
        r"\g<0> --help",
        "takes minutes, tests/test_tune.py runs it: are there such options?",
    ),
    Instead(
        r"(mlx-fused lora .*--train(?!.*--iters).*)",
        r"\1 --iters 2 --val-batches 1",
        "takes minutes with the 1000 steps that are mlx-lm's default",
    ),
    Instead(
        r"mlx-fused validate mlx-community/\S+",
        r"\g<0> --prompt hello",
        "takes a minute with the longer prompt that is the default",
    ),
    Instead(
        r"""(?:\S*=\S* )*(?:\S*/)?pip install ['"]"""
        r"""(?:\.|mlx-fused|\$\(ls dist/\*cp311\*\.whl\))\[([\w-]+)\]['"]\s*""",
        r'grep "^\1 = " "$ROOT"/pyproject.toml',
        "the tests' environment is made already: is there such an extra?",
    ),
    Instead(
        r"(?:\S*/)?pip install ((?:\S+==\S+ ?)+)",
        r"pip install --dry-run --no-index \1",
        "the tests' environment is made already: of these versions?",
    ),
    Instead(
        r"(?:\S*/)?(pip install .*--editable \.)",
        r"\1 --help",
        "compiles: are there such options?",
    ),
    Instead(
        r"mlx-fused server .*",
        # In the background until the page ends; the next command comes when it answers.
        r"\g<0> --port $PORT & until curl -s http://localhost:$PORT; do kill -0 $!; sleep 0.1; done",
        "does not end by itself, and its port may be in use",
    ),
    Instead(r"curl (.*)localhost:8080(.*)", r"curl --fail \1localhost:$PORT\2", "see the server"),
    Instead(
        r"mlx-fused \w+ .*\[--.*",
        lambda match: re.sub(r"[][]|\.\.\.", "", match[0]) + " --help",
        "a summary of options: are there such options?",
    ),
)


def blocks(page: Path) -> list[Block]:
    tokens = MarkdownIt().parse(page.read_text(encoding="utf-8"))
    return [Block(t.info, t.map[0] + 1, t.content) for t in tokens if t.type in ("fence", "code_block")]


def names(page: Path) -> list[str]:
    """What the page's sentences and tables have between backquotes."""
    tokens = MarkdownIt().enable("table").parse(page.read_text(encoding="utf-8"))
    return [child.content for t in tokens for child in t.children or () if child.type == "code_inline"]


def find_instead(command: str) -> Instead | None:
    return next((entry for entry in INSTEAD if re.fullmatch(entry.pattern, command)), None)


def script(block: Block) -> str:
    """What is run of a block of shell."""
    found = ((command, find_instead(command)) for command in block.commands())
    return "\n".join(
        re.sub(entry.pattern, entry.run, line, count=1) if entry else line for line, entry in found
    )


def main(page: Path) -> None:
    variables = {"__name__": "__main__"}
    sys.path.insert(0, os.getcwd())
    for block in blocks(page):
        where = f"{page}:{block.line}"
        print(f"--- {where}", flush=True)
        if block.language == "sh":
            shell = ["bash", "-e", "-x", "-o", "pipefail", "-c", script(block)]
            if subprocess.run(shell, input=INPUT, text=True).returncode:
                sys.exit(f"{where} failed")
        elif block.language == "python" and ">>>" in block.text:
            test = doctest.DocTestParser().get_doctest(block.text, variables, where, str(page), block.line)
            flags = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE | doctest.FAIL_FAST
            if doctest.DocTestRunner(optionflags=flags).run(test, clear_globs=False).failed:
                sys.exit(f"{where} printed something else")
            variables = test.globs
        elif block.language == "python":
            exec(compile("\n" * block.line + block.text, page, "exec"), variables)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
