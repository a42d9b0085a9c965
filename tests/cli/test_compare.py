import itertools
import json
import re
from dataclasses import replace
from html.parser import HTMLParser

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from imaml import MAML, GradientDescent, Objective, Task
from imaml.cli import _arena, _presets, _time_left, main
from imaml.cli._command_line import parse
from imaml.cli._memory_curves import INNER_STEPS
from imaml.cli._usual_loop import usual_loop
from imaml.training import _trainer

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
    assert len(page.links) == 10  # five figures, light and dark
    assert all(link.startswith("data:image/svg+xml;base64,") for link in page.links)
    assert not {"script", "link", "iframe", "object", "embed"} & set(page.tags)
    outside_images = re.sub(r"base64,[\w+/=]+", "", (compared / "report.html").read_text())
    assert not re.search(r"//|@import|url\(", outside_images)


def test_the_file_beside_the_report_gives_the_same_options(compared):
    flags = [*TINY, "--steps", "4", "--eval-every", "2", "--cg-steps", "7"]
    file = compared / "config.toml"
    assert parse(["compare", "--config", str(file)]) == replace(parse(flags), file=file)


def test_the_report_shows_the_numbers_the_options_and_the_machine(compared, page):
    text = " ".join(page.text)
    results = json.loads((compared / "results.json").read_text())
    for outcome in results["outcomes"]:
        assert f"{outcome['test']['mean']:.3f} ± {outcome['test']['interval']:.3f}" in text
        assert f"{outcome['cosine_end']:.4f}" in text
    for shown in ("MAML", "FOMAML", "iMAML", "--cg-steps", results["settings"]["torch"], results["settings"]["cpu"]):
        assert shown in text
    for figure in ("memory-by-inner-steps", "by-step", "by-seconds", "memory", "time"):
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


def test_the_report_leads_with_the_sentence_and_its_picture_then_the_curve_then_the_table(compared):
    html = (compared / "report.html").read_text()
    first, second = (match.start() for match in itertools.islice(re.finditer("<picture>", html), 2))
    order = [html.index("<h1>At 32 inner steps the usual loop holds"), first, html.index("Accuracy against time")]
    assert [*order, second, html.index("<table>")] == sorted([*order, second, html.index("<table>")])


def test_our_memory_is_flat_where_that_of_the_loop_grows(compared):
    loop, *ours = json.loads((compared / "results.json").read_text())["memory"]
    assert loop["method"] == "loop" and [curve["method"] for curve in ours] == ["maml", "fomaml", "imaml"]
    growth = [peak - loop["peak_bytes"][0] for peak in loop["peak_bytes"]]
    assert growth[-1] == pytest.approx((INNER_STEPS[-1] - 1) * growth[1], rel=0.2) and growth[1] > 0
    for curve in ours:
        assert max(curve["peak_bytes"]) < 0.5 * loop["peak_bytes"][-1]
        assert curve["peak_bytes"][-1] < 1.1 * curve["peak_bytes"][3]


@pytest.mark.parametrize("adapt", [None, ["2"]])
@pytest.mark.parametrize("regularization", [0.0, 0.7])
def test_the_usual_loop_finds_the_gradient_of_maml(adapt, regularization):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 2)).double()

    def batch():
        return torch.randn(6, 3, dtype=torch.float64), torch.randint(2, (6,))

    task = Task(support=batch(), query=batch())
    objective = Objective(model, F.cross_entropy, adapt=adapt)
    engine = MAML(inner=GradientDescent(lr=0.5, steps=4), regularization=regularization, checkpoints=2)
    _, expected = engine.value_and_grad(objective, [task])
    found = usual_loop(
        model, F.cross_entropy, task, adapted=objective.adapted, lr=0.5, steps=4, regularization=regularization
    )
    assert found.keys() == expected.keys()
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-9, atol=1e-12)


def test_the_steps_alone_decide_and_a_slow_clock_changes_no_number(compared, tmp_path, monkeypatch):
    slow = itertools.count(0.0, 1000.0)
    for module in (_arena, _time_left):
        monkeypatch.setattr(module, "monotonic", lambda: next(slow))
    monkeypatch.setattr(_trainer, "perf_counter", lambda: next(slow))
    assert main([*TINY, "--steps", "4", "--eval-every", "2", "--cg-steps", "7", "--out", str(tmp_path)]) == 0

    def numbers(folder):
        outcomes = json.loads((folder / "results.json").read_text())["outcomes"]
        for outcome in outcomes:
            del outcome["milliseconds"], outcome["peak_bytes"]
            for point in outcome["curve"]:
                del point["seconds"]
        return outcomes

    assert numbers(tmp_path) == numbers(compared)


def test_the_time_left_of_everything_and_the_threads_are_said(tmp_path, capsys):
    assert main([*TINY, "--steps", "4", "--eval-every", "2", "--meta-lr", "0.01", "--out", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("One thread")
    assert re.search(r"^\d+:\d\d left: MAML 4 meta-steps, FOMAML 4 meta-steps, iMAML 4 meta-steps\.$", printed, re.M)
    assert len(re.findall(r"^[1-3]/3 i?(?:FO)?MAML .* \d+:\d\d left$", printed, re.M)) == 6
    sentence, table, path = (printed.index(text) for text in ("At 32 inner steps", "cosine", "Report: "))
    assert sentence < table < path
    plans = json.loads((tmp_path / "results.json").read_text())["settings"]["plans"]
    assert {plan["meta_lr"] for plan in plans.values()} == {0.01}


def test_the_time_left_follows_the_pace_and_ends_at_the_deadline(monkeypatch):
    now = 100.0
    monkeypatch.setattr(_time_left, "monotonic", lambda: now)
    free, bound = _time_left.TimeLeft(100.0), _time_left.TimeLeft(100.0, deadline=250.0)
    assert free.seconds == bound.seconds == 100
    now = 150.0  # 50 seconds for what should have taken 20
    for left in (free, bound):
        left.did(20.0)
    assert free.seconds == pytest.approx(200) and str(free) == "3:20"
    assert bound.seconds == pytest.approx(100)
    free.did(80.0)
    assert free.seconds == 0


def test_the_demo_counts_its_work_in_steps_on_one_thread():
    demo = _presets.compare("glyphs")
    assert demo.plan.minutes is None and demo.machine.threads == 1


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
