"""Formulas in LaTeX between dollar signs become MathML, which browsers draw by themselves: nothing is fetched."""

import re
from xml.etree.ElementTree import Element

from latex2mathml.converter import convert_to_element
from markdown import Markdown
from markdown.extensions import Extension
from markdown.inlinepatterns import InlineProcessor

FORMULA = r"(?<!\\)(?P<dollars>\${1,2})(?P<latex>[^\s$`](?:[^$`]*[^\s$`])?|(?<=\$\$)[^$`]+)(?P=dollars)"
"""One dollar sign on each side for a formula within a line, two for one that stands by itself."""

WORD = re.compile(r"\\(?:text|mathrm)\{[^}]*\}|(?<![\\A-Za-z])(lr|[A-Za-z]{3,}(?:\\_[a-z]+)*)(?![A-Za-z])")
"""A name of several letters in a formula is no product: it is set upright."""


class Formulas(Extension):
    """Goes before whatever else a character of a formula could mean."""

    def extendMarkdown(self, md: Markdown) -> None:
        """Register the pattern, below code between backticks (190) and above everything else."""
        md.inlinePatterns.register(_Formula(FORMULA, md), "formula", 185)


class _Formula(InlineProcessor):
    def handleMatch(self, m: re.Match[str], data: str) -> tuple[Element, int, int]:
        display = "block" if m["dollars"] == "$$" else "inline"
        latex = WORD.sub(lambda word: rf"\mathrm{{{word[1]}}}" if word[1] else word[0], m["latex"].strip())
        element = convert_to_element(latex, display=display)
        for operator in element.iter("mo"):
            if operator.text in ("|", "&#x0007C;"):  # a norm's bar, which has the room of a relation otherwise
                operator.attrib |= {"lspace": "0", "rspace": "0"}
        return element, m.start(), m.end()


def makeExtension(**options: object) -> Formulas:
    """What Python-Markdown calls, by this name."""
    return Formulas(**options)
