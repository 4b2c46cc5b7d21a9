"""The documentation: the site builds without a warning and has every public name; links lead somewhere."""

import inspect
import re
import subprocess
import sys
from pathlib import Path

import pytest
from markdown_it import MarkdownIt
from mdit_py_plugins.anchors import anchors_plugin

import mlx_fused
from mlx_fused import losses, nn, patching

ROOT = Path(__file__).parents[1]
PAGES = [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")]
MARKDOWN = MarkdownIt("commonmark").enable("table").use(anchors_plugin, max_level=6)

# By what stands after "mlx_fused." in their full names.
_MODULES = ("__version__", "losses", "nn")
PUBLIC = {name: getattr(mlx_fused, name) for name in mlx_fused.__all__ if name not in _MODULES}
PUBLIC |= {f"patching.{name}": getattr(patching, name) for name in patching.__all__ if name not in PUBLIC}
PUBLIC |= {
    f"{module}.{name}": value
    for module, of in (("losses", losses), ("nn", nn))
    for name, value in vars(of).items()
    if getattr(value, "__module__", None) == of.__name__ and not name.startswith("_")
}


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The built site, once it has no warnings."""
    out = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "sphinx", "-q", "--fail-on-warning", "--keep-going"]
    build = subprocess.run([*command, ROOT / "docs", out], capture_output=True, text=True)
    assert build.returncode == 0, build.stderr
    return out


def test_reference_has_every_public_name(site):
    text = (site / "reference.html").read_text()
    assert not [name for name in PUBLIC if f'id="mlx_fused.{name}"' not in text]


@pytest.mark.parametrize("name", [name for name, value in PUBLIC.items() if inspect.isclass(value)])
def test_docstrings_of_classes(name):
    doc = vars(PUBLIC[name])["__doc__"]  # not an inherited one
    assert doc and not doc.startswith(f"{PUBLIC[name].__name__}(")  # nor one that `dataclass` made


@pytest.mark.parametrize("name", [name for name, value in PUBLIC.items() if inspect.isfunction(value)])
def test_docstrings_of_functions(name):
    doc, signature = inspect.getdoc(PUBLIC[name]), inspect.signature(PUBLIC[name])
    assert doc
    if signature.return_annotation != "None":
        assert re.search("^(Returns|Yields):$", doc, re.M)
    if "The arguments and errors are those of" not in doc:
        assert re.search("^Raises:$", doc, re.M)
        assert not [n for n in signature.parameters if not re.search(rf"^    {n} \(", doc, re.M)]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_of_the_files(page):
    """As GitHub shows them; Sphinx checks those of the site."""
    for link in links(page):
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.is_relative_to(ROOT) and target.exists(), link
        assert not anchor or anchor in anchors(target), link


def links(page):
    """The relative links of a page, those of images included."""
    inlines = [token for token in MARKDOWN.parse(page.read_text()) if token.type == "inline"]
    tokens = [token for inline in inlines for token in inline.children]
    found = [token.attrGet("href") or token.attrGet("src") for token in tokens]
    return [link for link in found if link and not re.match(r"[a-z]+:", link)]


def anchors(page):
    return {token.attrGet("id") for token in MARKDOWN.parse(page.read_text()) if token.type == "heading_open"}
