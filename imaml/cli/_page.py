"""HTML pages that carry everything in themselves."""

from __future__ import annotations

import re
from base64 import b64encode
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path
from typing import Any

import jinja2
from matplotlib.figure import Figure

from imaml.cli._figures import DARK, LIGHT, Theme, save_png
from imaml.training import replace_file

Drawing = Callable[[Theme], Figure]


@dataclass(frozen=True, kw_only=True)
class Section:
    """A table with figures below it.

    Args:
        title: Heading.
        headings: Headings of the columns.
        rows: Cells as they are shown.
        bold: First cells of rows that stand out.
        drawings: What draws each figure, by caption.
    """

    title: str
    headings: Sequence[str]
    rows: Sequence[Sequence[str]]
    bold: Sequence[str] = ()
    drawings: Mapping[str, Drawing] = field(default_factory=dict)

    @property
    def figures(self) -> dict[str, list[str]]:
        """The figures on a light and on a dark page, as data URIs."""
        return {
            caption: [data_uri(drawing(theme), "png") for theme in (LIGHT, DARK)]
            for caption, drawing in self.drawings.items()
        }


def write_page(path: Path, template: str, **content: Any) -> None:
    """Fill one of the templates beside this file and write the page.

    Args:
        path: Where the page goes.
        template: Name of the file.
        content: What it names; always `settings`, what `environment` returns.
    """
    templates = jinja2.Environment(
        loader=jinja2.PackageLoader("imaml.cli", ""),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
    )
    page = templates.get_template(template).render(**content)
    replace_file(path, lambda stream: stream.write(page.encode()))


def save_figures(folder: Path, sections: Iterable[Section]) -> None:
    """Write every figure of the sections as a PNG file, named by section and caption, in place of old ones."""
    for section in sections:
        for old in folder.glob(f"{_slug(section.title)}-*.png"):
            old.unlink()
        for caption, drawing in section.drawings.items():
            save_png(folder / f"{_slug(section.title)}-{_slug(caption)}.png", drawing(LIGHT))


def _slug(text: str) -> str:
    """The words before a colon or semicolon, in lower case, joined by dashes."""
    return "-".join(re.findall("[a-z0-9]+", re.split("[:;]", text)[0].lower()))


def data_uri(figure: Figure, form: str) -> str:
    """A figure within the page: "svg" or "png"."""
    stream = BytesIO()
    if form == "svg":
        figure.savefig(stream, format=form, metadata={"Date": None})
        form = "svg+xml"
    else:
        figure.savefig(stream, format=form, dpi=150)
    return f"data:image/{form};base64," + b64encode(stream.getvalue()).decode()
