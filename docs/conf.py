"""Sphinx's settings: `make docs` builds the site from these pages and from the package's docstrings."""

from pathlib import Path

from docutils import nodes

from mlx_fused import __version__

REPOSITORY = "https://github.com/mlx-fused/mlx-fused"
ROOT = Path(__file__).parents[1]

project = "mlx-fused"
copyright = "2026, the mlx-fused authors"
version = release = __version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode"]
napoleon_use_param = napoleon_use_rtype = False  # types are text, such as "int, optional"
nitpicky = True  # a reference to nothing is an error
myst_heading_anchors = 4  # the anchors that GitHub gives to headings
linkcheck_ignore = [REPOSITORY]  # `leave_the_site` looks for these in the working tree

autodoc_member_order = "bysource"
autodoc_typehints = "none"  # the docstrings have the types, with shapes

html_theme = "furo"
html_title = f"mlx-fused {version}"
html_static_path = ["static"]
html_css_files = ["wide.css"]


def leave_the_site(app, doctree):
    """Lets links to files that are no pages lead to the repository."""
    is_readme = app.env.docname == app.config.root_doc
    folder = ROOT if is_readme else Path(app.srcdir, app.env.docname).parent
    for node in list(doctree.findall(nodes.Element)):
        if node.get("reftype") != "myst" or node.get("refdomain"):
            continue
        path = (folder / node["reftarget"]).resolve()
        if path.is_relative_to(ROOT) and path.exists():
            uri = f"{REPOSITORY}/blob/main/{path.relative_to(ROOT)}"
            node.replace_self(nodes.reference("", "", *node.children, refuri=uri))


def setup(app):
    app.connect("doctree-read", leave_the_site)
