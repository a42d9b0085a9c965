"""The Python of a page of the documentation."""

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def read(page: str) -> str:
    """The text of a page, by its path in the checkout."""
    return (ROOT / page).read_text(encoding="utf-8")


def python(text: str) -> list[str]:
    """The blocks fenced as `python`, in order."""
    return re.findall(r"```python\n(.*?)```", text, re.DOTALL)


def sections(text: str) -> dict[str, list[str]]:
    """The same below each heading of the second level that has any."""
    parts = re.split(r"(?m)^## (.*)$", text)[1:]
    found = {title: python(body) for title, body in zip(parts[::2], parts[1::2], strict=True)}
    return {title: blocks for title, blocks in found.items() if blocks}


def run(page: str) -> dict[str, object]:
    """Run the blocks of a page, one after the other, in one namespace; returns it."""
    namespace: dict[str, object] = {}
    for block in python(read(page)):
        exec(compile(block, page, "exec"), namespace)
    return namespace
