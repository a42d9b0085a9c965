"""Formulas in LaTeX between dollar signs become MathML, which browsers draw by themselves: nothing is fetched."""

import re
from xml.etree.ElementTree import Element

from latex2mathml.converter import convert_to_element
from markdown import Markdown
from markdown.extensions import Extension
from markdown.inlinepatterns import InlineProcessor

FORMULA = r"(?<!\\)(?P<dollars>\${1,2})(?P<latex>[^\s$`](?:[^$`]*[^\s$`])?|(?<=\$\$)[^$`]+)(?P=dollars)"
"""One dollar sign on each side for a formula within a line, two for one that stands by itself."""


class Formulas(Extension):
    """Goes before whatever else a character of a formula could mean."""

    def extendMarkdown(self, md: Markdown) -> None:
        """Register the pattern, below code between backticks (190) and above everything else."""
        md.inlinePatterns.register(_Formula(FORMULA, md), "formula", 185)


class _Formula(InlineProcessor):
    def handleMatch(self, m: re.Match[str], data: str) -> tuple[Element, int, int]:
        display = "block" if m["dollars"] == "$$" else "inline"
        return convert_to_element(m["latex"].strip(), display=display), m.start(), m.end()


def makeExtension(**options: object) -> Formulas:
    """What Python-Markdown calls, by this name."""
    return Formulas(**options)
