"""Sphinx's settings. CONTRIBUTING.md has the commands."""

import re
import sys
from pathlib import Path

from docutils import nodes
from docutils.utils.math.latex2mathml import tex2mathml
from sphinx.util.docutils import SphinxDirective

sys.path.insert(0, str(Path(__file__).parent.parent))
sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))

import support  # the table in tests/

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


def anchor(test: str) -> str:
    """What the proof of a cell is called, as the target of a link."""
    return "proof-" + re.sub(r"\W+", "-", test)


class SupportMatrix(SphinxDirective):
    """Class x feature: each cell leads to the test that shows it, or to the reason why not."""

    def run(self):
        reasons: dict[tuple[str, str], int] = {}
        lines = []
        for section, rows in support.SECTIONS.items():
            lines += ["", f".. rubric:: {section}", ""]
            lines += [".. list-table::", "   :header-rows: 1", "   :class: matrix", ""]
            head = ["", *(f"``{name}``" for name in support.COLUMNS)]
            for row in [head, *([feature, *map(self.cell(reasons), line.values())] for feature, line in rows.items())]:
                lines += [f"   {'* - ' if i == 0 else '  - '}{text}" for i, text in enumerate(row)]
        lines += ["", ".. rubric:: Limits and reasons", ""]
        for (why, test), number in reasons.items():
            shown = f" (:ref:`test <{anchor(test)}>`)" if test else ""
            lines += [f".. _why-{number}:", "", f"{number}. {why}{shown}", ""]
        return self.parse_text_to_nodes("\n".join(lines))

    @staticmethod
    def cell(reasons):
        """A function that writes a cell, and notes its reason."""

        def write(cell):
            if cell.works == "yes":
                return f":ref:`yes <{anchor(cell.test)}>`"
            number = reasons.setdefault((cell.why, cell.test), len(reasons) + 1)
            return f":ref:`{cell.works} <why-{number}>`"

        return write


class Proofs(SphinxDirective):
    """The tests that the matrix leads to, in full."""

    def run(self):
        lines = []
        for test in support.named_tests():
            file, _, name = test.partition("::")
            title = name.removeprefix("test_").replace("_", " ").capitalize()
            lines += ["", f".. _{anchor(test)}:", "", f".. rubric:: {title}", "", f"``tests/{file}``", ""]
            lines += [f".. literalinclude:: ../tests/{file}", f"   :pyobject: {name}", ""]
        return self.parse_text_to_nodes("\n".join(lines))


def setup(app):
    """Register what is above."""
    app.add_html_math_renderer("mathml", (visit_inline, None), (visit_block, None))
    app.add_directive("support-matrix", SupportMatrix)
    app.add_directive("proofs", Proofs)
    return {"parallel_read_safe": True}
