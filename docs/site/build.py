"""Build the site into build/site, and look at every link of it: whatever leads nowhere is a failure.

python docs/site/build.py
"""

import os
import subprocess
import sys
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote

from pages import assemble
from sources import ROOT

HERE = Path(__file__).parent
PAGES, SITE = ROOT / "build" / "pages", ROOT / "build" / "site"


def main() -> int:
    """Assemble the pages and build them; returns 1 where there is anything to complain of."""
    assemble(PAGES)
    program = Path(sys.executable).with_name("zensical")
    environment = {**os.environ, "PYTHONPATH": str(HERE)}
    run = subprocess.run([program, "build", "--clean", "--strict"], cwd=ROOT, env=environment, check=False)
    broken = list(broken_links(SITE)) if run.returncode == 0 else []
    for page, link in broken:
        print(f"{page}: {link} leads nowhere", file=sys.stderr)
    return 1 if run.returncode or broken else 0


def broken_links(site: Path) -> Iterator[tuple[Path, str]]:
    """The links of the site's pages, and what they show or run, that lead to no file or anchor of it."""
    pages = {page: _Links(page.read_text(encoding="utf-8")) for page in sorted(site.rglob("*.html"))}
    for page, found in pages.items():
        if page.name == "404.html":  # is shown for every address, so that its links start at the root
            continue
        for link in found.links:
            place, _, anchor = unquote(link).partition("#")
            target = (page.parent / place).resolve() if place else page
            if not target.is_file() or anchor and target in pages and anchor not in pages[target].anchors:
                yield page.relative_to(site), link


class _Links(HTMLParser):
    """The links of a page within the site, and its anchors."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.links: set[str] = set()
        self.anchors: set[str] = set()
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        for name, value in attrs:
            if name == "id" and value:
                self.anchors.add(value)
            elif name in ("href", "src") and value and "://" not in value:
                self.links.add(value)


if __name__ == "__main__":
    sys.exit(main())
