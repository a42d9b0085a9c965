"""The Python of a page of the documentation."""

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def sections(page: str) -> dict[str, list[str]]:
    """The blocks fenced as `python` below each heading of the second level, in order."""
    text = (ROOT / page).read_text(encoding="utf-8")
    parts = re.split(r"(?m)^## (.*)$", text)[1:]
    pairs = zip(parts[::2], parts[1::2], strict=True)
    found = {title: re.findall(r"```python\n(.*?)```", body, re.DOTALL) for title, body in pairs}
    return {title: blocks for title, blocks in found.items() if blocks}
