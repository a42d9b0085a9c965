"""The site: its reference has every public name, its navigation every page, and its links lead where they did."""

import importlib
import inspect
import re
import tomllib

import pytest

from tests.pages import ROOT

FOLDER = ROOT / "docs" / "site"
PUBLIC = {
    f"imaml.{path.stem}"
    for path in (ROOT / "imaml").iterdir()
    if not path.stem.startswith("_") and (path.suffix == ".py" or (path / "__init__.py").exists())
} - {"imaml.cli"}


@pytest.fixture(scope="module")
def site():
    """What assembles the pages, which imports its neighbours as the modules of a script do."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(FOLDER)
        yield {name: importlib.import_module(name) for name in ("build", "pages", "sources", "wording")}


@pytest.fixture(scope="module")
def assembled(site, tmp_path_factory):
    """The pages by their place, as text."""
    folder = tmp_path_factory.mktemp("site")
    return {str(page): (folder / page).read_text(encoding="utf-8") for page in site["pages"].assemble(folder)}


def public_names(name):
    """What a package hands on, or what a plain module defines: all but what it imports for its own use."""
    module = importlib.import_module(name)
    public = {key: value for key, value in vars(module).items() if not (key.startswith("_") or inspect.ismodule(value))}
    if hasattr(module, "__path__"):
        return {*public}
    return {
        key for key, value in public.items() if isinstance(value, float) or getattr(value, "__module__", "") == name
    }


def test_the_reference_has_a_page_for_every_public_module(site, assembled):
    assert set(site["sources"].MODULES) == {"imaml", "imaml_solvers", *PUBLIC}
    assert {f"reference/{name}.md" for name in site["sources"].MODULES} <= assembled.keys()


@pytest.mark.parametrize("name", sorted({"imaml", "imaml_solvers", *PUBLIC}))
def test_the_reference_lists_every_public_name_and_describes_each_once(name, assembled):
    listed = re.findall(r"(?m)^\| \[`(\w+)`\]\[([\w.]+)\]", assembled[f"reference/{name}.md"])
    assert {key for key, _ in listed} == public_names(name)
    everything = "\n".join(assembled.values())
    for _, path in listed:
        assert len(re.findall(rf"(?m)^::: {re.escape(path)}$", everything)) == 1


def test_only_documented_members_are_described_private_bases_included(site):
    members = site["sources"].members
    assert members("imaml.Report")["query_loss"] and not members("imaml.Report")["hvps"]
    assert "__call__" in members("imaml.MetaGradient") and "_memory" not in members("imaml.MetaGradient")
    assert "adapt" in members("imaml.Problem") and "stepper" not in members("imaml.Problem")


def places(entries):
    for entry in entries:
        for value in entry.values() if isinstance(entry, dict) else [entry]:
            yield from [value] if isinstance(value, str) else places(value)


def test_the_navigation_has_every_page(assembled):
    project = tomllib.loads((ROOT / "zensical.toml").read_text(encoding="utf-8"))["project"]
    assert sorted(places(project["nav"])) == sorted(assembled)


def test_links_follow_the_pages_to_their_places(site, tmp_path):
    pages = site["pages"]
    at = pages.places()
    text = (
        "[a](guide.md#verify) [b](../benchmarks/results/rivals/README.md) [c](../examples) [d](#here)\n"
        "[e](../benchmarks/results/inner_training/t16.json) `[f](g.md)`\n\n```\n[h](i.md)\n```\n"
    )
    source = next(path for path in at if path.name == "results.md")
    moved = pages.moved(text, source, at, tmp_path)
    for link in ("guide.md#verify", "benchmarks/rivals.md", "gallery/index.md", "#here", "g.md", "i.md"):
        assert f"]({link})" in moved
    kept = "files/benchmarks/results/inner_training/t16.json"
    assert f"]({kept})" in moved and (tmp_path / kept).exists()


def test_a_link_that_leads_nowhere_is_an_error(site, tmp_path):
    pages = site["pages"]
    at = pages.places()
    source = next(path for path in at if path.name == "results.md")
    with pytest.raises(ValueError, match=r"Got 'gone\.md' in docs/results\.md"):
        pages.moved("[a](gone.md)", source, at, tmp_path)


def test_a_docstring_is_reworded_for_the_site(site):
    reword = site["wording"].for_the_site
    path = "imaml._strategies.maml.MAML"
    assert reword("As `FOMAML` does.", path) == "As [`FOMAML`][imaml.FOMAML] does."
    assert reword("See `Solution.status`.", path) == "See [`Solution.status`][imaml_solvers.Solution.status]."
    assert reword("See docs/numerics.md.", path) == "See [docs/numerics.md](../numerics.html)."
    assert reword("Args:\n    eps: > 0.", path) == "Args:\n    eps: \\> 0."
    assert reword("phi_K <- theta with alpha <= 1", path) == "φ_K ← θ with α ≤ 1"


@pytest.mark.parametrize(
    "text",
    [
        "`recompute` is an option.\n\nArgs:\n    recompute: Which.",
        "f(lambda inner: inner)",
        "Args:\n    phi: Where.",
        "`alpha`, $\\alpha <= 1$ and lr=alpha",
        "`torch.optim.Adam`",
    ],
)
def test_what_only_looks_like_a_name_or_a_letter_stays(site, text):
    assert site["wording"].for_the_site(text, "imaml._strategies.maml.MAML") == text


def test_links_of_the_built_site_that_lead_nowhere_are_found(site, tmp_path):
    (tmp_path / "here.html").write_text(
        '<p id="top"><a href="#top">a</a> <a href="there.html#φ">b</a> <a href="https://example.org/c">c</a>'
        '<a href="#gone">d</a> <a href="there.html#gone">e</a> <img src="gone.png"></p>',
        encoding="utf-8",
    )
    (tmp_path / "there.html").write_text('<h1 id="φ"><a href="here.html">back</a></h1>', encoding="utf-8")
    found = {link for _, link in site["build"].broken_links(tmp_path)}
    assert found == {"#gone", "there.html#gone", "gone.png"}
