"""Sphinx's settings. CONTRIBUTING.md has the commands."""

import re
import sys
from pathlib import Path

from docutils import nodes
from docutils.utils.math.latex2mathml import tex2mathml

sys.path.insert(0, str(Path(__file__).parent.parent))

import optimzoo

project = "optimzoo"
author = "the optimzoo authors"
copyright = author
release = version = optimzoo.__version__

extensions = [
    "sphinx.ext.autodoc",
    "sphinx.ext.doctest",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "myst_parser",  # for the Markdown tables that the benchmarks print, and for the files beside setup.cfg
]
exclude_patterns = ["_build", "results", "examples"]
suppress_warnings = ["myst.header"]  # an included table begins without a title

html_theme = "furo"
html_title = f"optimzoo {version}"
html_static_path = ["_static"]
html_css_files = ["custom.css"]
html_math_renderer = "mathml"

autodoc_member_order = "bysource"
autodoc_typehints = "none"  # the argument lists say it in words
autodoc_preserve_defaults = True
napoleon_google_docstring = True
napoleon_numpy_docstring = False

doctest_global_setup = f"""
__name__ = "__main__"  # what a class in an example is defined in
import sys

sys.path.insert(0, {str(Path(__file__).parent / "examples")!r})
import torch
import optimzoo
torch.manual_seed(0)
"""


def mathml(node: nodes.Element, block: bool) -> str:
    """A formula as MathML, which browsers draw themselves: no script, from no other host."""
    tex = node.astext()
    if block and r"\\" in tex:
        tex = rf"\begin{{aligned}}{tex}\end{{aligned}}"
    # Bars and slashes come out as relations, with space on both sides.
    loose, tight = r'<mo stretchy="false">(?=[|/]<)', '<mo stretchy="false" lspace="0" rspace="0">'
    return re.sub(loose, tight, tex2mathml(tex, block))


def visit_inline(writer, node):
    """Write one formula in a line of text."""
    writer.body.append(mathml(node, block=False))
    raise nodes.SkipNode


def visit_block(writer, node):
    """Write a displayed formula."""
    writer.body.append(f'<div class="math">{mathml(node, block=True)}</div>\n')
    raise nodes.SkipNode


def setup(app):
    """Register the renderer above."""
    app.add_html_math_renderer("mathml", (visit_inline, None), (visit_block, None))
    return {"parallel_read_safe": True}
