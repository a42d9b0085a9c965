"""What a docstring says for a terminal is said for the site: names become links, and alpha becomes α.

A name between backticks leads to where the reference describes it, and a page of docs/ to that page. Words between
backticks that name nothing public stay as they are.
"""

import re

from sources import MODULES, members, public_names

GREEK = {"alpha": "α", "beta": "β", "eta": "η", "theta": "θ", "lambda": "λ", "Lambda": "Λ", "mu": "μ", "phi": "φ"}
SIGNS = {"<-": "←", "<=": "≤", ">=": "≥"}
WORDS = re.compile(
    r"(?P<formula>\${1,2}[^$`]+\${1,2})"
    r"|`(?P<name>[A-Za-z_][\w.]*)`(?!`)"
    r"|(?P<code>`[^`]*`)"
    r"|(?<![\w/])docs/(?P<page>[\w-]+)\.md"
    rf"|(?<![A-Za-z_=\\])(?P<letter>{'|'.join(GREEK)})(?![A-Za-z=]|\w*:| \w+:)"
    r"|(?<=: )(?P<quote>>)(?= )"
    rf"|(?<= )(?P<sign>{'|'.join(SIGNS)})(?= )"
)
"""In the order in which they exclude one another; a letter is no argument's name, nor a lambda of Python's."""


def for_the_site(text: str, path: str) -> str:
    """The docstring of the object with a path."""

    def rewritten(match: re.Match[str]) -> str:
        if match["name"]:
            is_argument = re.search(rf"(?m)^ +{match['name']}: ", text)
            target = None if is_argument else described_at(match["name"], path)
            return f"[{match[0]}][{target}]" if target else match[0]
        if match["page"]:
            return f"[{match[0]}](../{match['page']}.html)"
        if match["quote"]:  # at the start of an entry it would begin a quotation
            return r"\>"
        return GREEK.get(match["letter"]) or SIGNS.get(match["sign"]) or match[0]

    return WORDS.sub(rewritten, text)


def described_at(name: str, path: str) -> str | None:
    """Where the reference describes a name that the docstring of the object with this path mentions, or None.

    Members of the object's own class go before names of its module, and these before names of the others. A word in
    small letters is elsewhere as likely an option as a function.
    """
    if name in MODULES:
        return name
    near = [module for module in MODULES if path.startswith(f"{module}.")]
    for place in (public_names(module).get(own) for module in near for own in path.split(".")):
        if place and name in members(place):
            return f"{place}.{name}"
    first, _, member = name.partition(".")
    for module in (*reversed(near), *(() if first.islower() else MODULES)):
        if place := public_names(module).get(first):
            return f"{place}.{member}" if member in members(place) else place
    return None
