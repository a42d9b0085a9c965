"""What the site is made of: the checkout's pages, its examples, and one page of reference for each public module.

The pages are written for the checkout, where their links lead to files. `assemble` puts each at its place on the site
and its links with it; a link to a file that is no page takes the file along. A link that leads nowhere is an error.
"""

import ast
import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path

from sources import MODULES, ROOT, has_private_base, members, public_names, summary
from wording import described_at, for_the_site

FENCE = re.compile(r"(?ms)^ *```.*?^ *```|`[^`\n]+`")
"""Code in a block or within a line, where nothing is a link."""

LINK = re.compile(r"(?P<before>\]\(|^\[[^\]\n]+\]: )(?P<link>[^)\s]+)", re.MULTILINE)


def places() -> dict[Path, Path]:
    """Where the pages of the checkout stand on the site, and where its examples do."""
    found = {
        Path("README.md"): Path("index.md"),
        Path("docs/README.md"): Path("pages.md"),
        Path("CHANGELOG.md"): Path("changelog.md"),
        Path("CONTRIBUTING.md"): Path("contributing.md"),
        Path("examples"): Path("gallery/index.md"),
    }
    for page in _within("docs", "*.md"):
        found.setdefault(page, Path(page.name))
    for page in _within("benchmarks/results", "*/*.md"):
        found[page] = Path("benchmarks", page.parent.name).with_suffix(".md")
    for script in _within("examples", "*.py"):
        if script.stem != "gallery":  # what runs them
            found[script] = Path("gallery", script.stem).with_suffix(".md")
    return found


def assemble(folder: Path) -> set[Path]:
    """Write the pages of the site, and what they show, into an empty folder; returns where the pages are in it."""
    shutil.rmtree(folder, ignore_errors=True)
    at = places()
    pages: dict[Path, str] = {at[Path("examples")]: gallery(at)}
    for source, page in at.items():
        if source.suffix == ".md":
            text = (ROOT / source).read_text(encoding="utf-8")
            title = "" if text.startswith("# ") else f"# {page.stem.capitalize()}\n\n"
            pages[page] = title + moved(text, source, at, folder)
        elif source.suffix == ".py":
            pages[page] = moved(example(source), source, at, folder)
    for module in MODULES:
        pages[reference_place(module)] = reference(module)
    for page, text in pages.items():
        target = folder / page
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(text, encoding="utf-8")
    for name in ("site.css", "iframe-worker.js"):
        shutil.copy(Path(__file__).with_name(name), folder)
    return {*pages}


def _within(folder: str, pattern: str) -> list[Path]:
    return sorted(path.relative_to(ROOT) for path in (ROOT / folder).glob(pattern))


def moved(text: str, source: Path, at: Mapping[Path, Path], folder: Path) -> str:
    """The text of a page as it is at its place on the site.

    Its links lead to the places of what they led to, and the first mention of a class of the library to the reference.
    """
    seen: set[str] = set()
    before, parts = "", []
    for is_code, part in _parts(text):
        place = described_at(part[1:-1], "") if is_code and not part.islower() else None
        if place and place not in seen and not before.endswith("[") and not before.rpartition("\n")[2].startswith("#"):
            seen.add(place)
            parts.append(f"[{part}][{place}]")
        else:
            parts.append(part if is_code else LINK.sub(lambda link: _link(link, source, at, folder), part))
        before = part
    return "".join(parts)


def _link(match: re.Match[str], source: Path, at: Mapping[Path, Path], folder: Path) -> str:
    place, hash_sign, anchor = match["link"].partition("#")
    if not place or "://" in place:
        return match[0]
    target = Path(os.path.normpath(source.parent / place))
    if target not in at and not (ROOT / target).is_file():
        raise ValueError(f"A link leads to a page or a file of the checkout. Got {match['link']!r} in {source}.")
    if target not in at:
        (folder / "files" / target).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / target, folder / "files" / target)
    there = os.path.relpath(at.get(target, Path("files", target)), at[source].parent)
    return f"{match['before']}{there}{hash_sign}{anchor}"


def _parts(text: str) -> Iterator[tuple[bool, str]]:
    """What is code and what is not, in order."""
    end = 0
    for match in FENCE.finditer(text):
        yield False, text[end : match.start()]
        yield True, match[0]
        end = match.end()
    yield False, text[end:]


def example(script: Path) -> str:
    """The page of an example: what its docstring says, what it found at full size, and the program."""
    source = (ROOT / script).read_text(encoding="utf-8")
    tree = ast.parse(source)
    program = "\n".join(source.splitlines()[tree.body[0].end_lineno :]).strip()
    parts = [f"# {script.name}", ast.get_docstring(tree) or "", *results(script), f"```python\n{program}\n```\n"]
    return "\n\n".join(parts)


def results(script: Path) -> list[str]:
    """The picture and the numbers that `examples/gallery.py` kept of a job; nothing of a script that is none."""
    kept = ROOT / record(script)
    if not kept.exists():
        return []
    found = json.loads(kept.read_text(encoding="utf-8"))
    rows = [f"| {name} | {value} |" for name, value in found["numbers"].items()]
    made = "Made by `{command}` in {seconds} seconds, on {threads} thread of {processor}, with torch {torch}."
    table = "\n".join(["| | |", "|---|---|", *rows])
    return [f"![What the program draws](results/{script.stem}.png)", table, made.format(**found)]


def record(script: Path) -> Path:
    """Where the results of a job are kept."""
    return script.parent / "results" / f"{script.stem}.json"


def gallery(at: Mapping[Path, Path]) -> str:
    """The page that lists the examples, each with the first paragraph of its docstring: jobs with their pictures."""
    scripts = [script for script in at if script.suffix == ".py"]
    jobs = [script for script in scripts if (ROOT / record(script)).exists()]
    lines = ["# Gallery", "", "Run a program from a checkout: `python examples/plain_loop.py`.", ""]
    lines += ["## Jobs", "", "Whole problems, solved. Each page has the program, what it found, and a picture.", ""]
    lines += [_entry(script, at[script]) for script in jobs]
    lines += [
        "",
        "## Patterns",
        "",
        "How the library stands in a loop, beside other libraries, and in larger studies.",
        "",
    ]
    lines += [_entry(script, at[script]) for script in scripts if script not in jobs]
    return "\n".join([*lines, ""])


def _entry(script: Path, page: Path) -> str:
    docstring = ast.get_docstring(ast.parse((ROOT / script).read_text(encoding="utf-8"))) or ""
    first, *_ = docstring.split("\n\n")
    return f"- **[{script.name}]({page.name})**<br>{first}"


def reference_place(module: str) -> Path:
    """Where the reference of a public module stands on the site."""
    return Path("reference", module).with_name(f"{module}.md")


def reference(module: str) -> str:
    """The page of a public module: a table of its names, and what `mkdocstrings` makes of the docstring of each.

    A name that another public module has too is described there, and stands in the table with a link.
    """
    names = public_names(module)
    lines = [f"::: {module}", "    options:", "      members: false", "      heading_level: 1"]
    lines += ["      show_root_full_path: true", ""]
    lines += ["| name | what it is |", "|---|---|"]
    lines += [f"| [`{name}`][{path}] | {for_the_site(summary(path), path)} |" for name, path in names.items()]
    for path in names.values():
        if path.rpartition(".")[0] == module:
            found = members(path)
            inherited = [name for name in found if found[name]]
            lines += ["", f"::: {path}", "    options:", f"      members: {[*found] or 'false'}"]
            lines += [f"      inherited_members: {inherited or 'false'}"]
            lines += ["      show_bases: false"] if has_private_base(path) else []
    return "\n".join([*lines, ""])
