import json
import re
from html.parser import HTMLParser

import pytest

from imaml.cli import main

TINY = ["compare", "--dataset", "sinusoid", "--meta-batch", "4", "--val-tasks", "4", "--eval-tasks", "6"]


class Page(HTMLParser):
    def __init__(self):
        super().__init__()
        self.links, self.tags, self.text = [], [], []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.links += [value for name, value in attrs if name in ("src", "srcset", "href", "data", "action", "poster")]

    def handle_data(self, data):
        self.text.append(data)


@pytest.fixture(scope="module")
def compared(tmp_path_factory):
    out = tmp_path_factory.mktemp("compared")
    assert main([*TINY, "--steps", "4", "--eval-every", "2", "--cg-steps", "7", "--out", str(out)]) == 0
    return out


@pytest.fixture(scope="module")
def page(compared):
    parsed = Page()
    parsed.feed((compared / "report.html").read_text())
    return parsed


def test_the_report_needs_nothing_else(compared, page):
    assert len(page.links) == 8  # four figures, light and dark
    assert all(link.startswith("data:image/svg+xml;base64,") for link in page.links)
    assert not {"script", "link", "iframe", "object", "embed"} & set(page.tags)
    outside_images = re.sub(r"base64,[\w+/=]+", "", (compared / "report.html").read_text())
    assert not re.search(r"//|@import|url\(", outside_images)


def test_the_report_shows_the_numbers_the_options_and_the_machine(compared, page):
    text = " ".join(page.text)
    results = json.loads((compared / "results.json").read_text())
    for outcome in results["outcomes"]:
        assert f"{outcome['test']['mean']:.3f} ± {outcome['test']['interval']:.3f}" in text
        assert f"{outcome['cosine_end']:.4f}" in text
    for shown in ("MAML", "FOMAML", "iMAML", "--cg-steps", results["settings"]["torch"], results["settings"]["cpu"]):
        assert shown in text
    for figure in ("by-step", "by-seconds", "memory", "time"):
        assert (compared / f"{figure}.png").read_bytes().startswith(b"\x89PNG")


def test_the_strategies_start_alike_and_differ_in_their_gradients(compared):
    results = json.loads((compared / "results.json").read_text())
    maml, fomaml, imaml = results["outcomes"]
    assert [outcome["strategy"] for outcome in results["outcomes"]] == ["maml", "fomaml", "imaml"]
    assert maml["curve"][0] == fomaml["curve"][0]  # the same inner loop at the same parameters
    assert [point["step"] for point in maml["curve"]] == [0, 2, 4]
    assert maml["cosine_start"] == pytest.approx(1, abs=1e-6) == maml["cosine_end"]
    assert 0.5 < fomaml["cosine_start"] < 0.999
    assert fomaml["cosine_start"] < imaml["cosine_start"] < 1
    assert fomaml["peak_bytes"] < maml["peak_bytes"]
    assert all(outcome["steps"] == 4 and outcome["milliseconds"] > 0 for outcome in results["outcomes"])
    assert results["settings"]["engines"]["imaml"]["cg_steps"] == 7
    assert results["settings"]["engines"]["maml"]["cg_steps"] is None


def test_a_budget_of_time_is_shared_and_the_table_printed(tmp_path, capsys):
    assert main([*TINY, "--minutes", "0.05", "--strategies", "maml", "fomaml", "--out", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    outcomes = json.loads((tmp_path / "results.json").read_text())["outcomes"]
    assert [outcome["strategy"] for outcome in outcomes] == ["maml", "fomaml"]
    assert all(1 <= outcome["steps"] < 10_000 for outcome in outcomes)
    assert all(f"{outcome['cosine_start']:.4f}" in printed for outcome in outcomes)
    assert "report.html" in printed


def test_a_folder_that_cannot_be_written(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert main([*TINY, "--out", str(tmp_path / "file")]) == 2
    expected = f"imaml: The run folder {tmp_path / 'file'} cannot be written (File exists). Name another.\n"
    assert capsys.readouterr().err == expected


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--strategies", "maml", "fomaml", "--cg-steps", "3"], "--cg-steps applies to none of maml, fomaml. Got 3"),
        (["--ways", "5"], "--ways does not apply to --dataset sinusoid"),
        (["--regularization", "-1"], "`regularization`"),
        (["--strategies"], "--strategies needs at least one"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(tmp_path, capsys, options, message):
    assert main([*TINY, "--out", str(tmp_path / "out"), *options]) == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert captured.err.count("\n") == 1
    assert not (tmp_path / "out").exists()
