"""`imaml bench`: what it measures, what it advises, and its page."""

import json
import shutil
import subprocess
import sys

import pytest
from matplotlib.image import imread

from imaml.cli import main
from imaml.cli._bench import _advice
from imaml.cli._bench_costs import Cost
from tests.cli.factory import FACTORY

MODULE = (
    FACTORY
    + """
def with_engine():
    return *make(), MAML(inner=GradientDescent(lr=0.2, steps=4), regularization=0.5)

def with_newton():
    return *make(), ImplicitMAML(inner=NewtonCG(steps=2), on_failure="raise")

class Cube(torch.autograd.Function):
    # without a forward derivative

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    def backward(ctx, g):
        return 3 * ctx.saved_tensors[0] ** 2 * g

def without_forward_derivative():
    objective, tasks = make()
    return Objective(objective.model, lambda out, y: F.mse_loss(Cube.apply(out), y)), tasks

def with_learned_step():
    objective, tasks = make()
    objective = Objective(objective.model, F.mse_loss, meta={"log_lr": torch.tensor(-2.0, requires_grad=True)})
    return objective, tasks, MAML(inner=GradientDescent(lr=lambda meta: meta["log_lr"].exp(), steps=3))

class Single(nn.Linear):
    def forward(self, x):
        return super().forward(torch.cat([x[..., :1].float(), torch.zeros(len(x), 1)], -1))

def in_float32_alone():
    return Objective(Single(2, 2), F.mse_loss), make()[1]

def fails():
    objective, tasks = make()
    return Objective(objective.model, lambda out, y: F.mse_loss(out @ torch.ones(3, 2), y)), tasks
"""
)


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Run `imaml bench` on the module above; returns the exit code and the rows."""
    (tmp_path / "user_bench.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)

    def run(*args):
        sys.modules.pop("user_bench", None)
        code = main(["bench", *args, "--repeats", "1", "--out", str(tmp_path / "out")])
        file = tmp_path / "out" / "results.jsonl"
        return code, [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []

    return run


def test_every_setting_is_measured_and_the_exact_ones_are_exact(run, capsys):
    code, rows = run("user_bench:make", "--inner-lr", "0.1")
    assert code == 0
    assert {row["strategy"] for row in rows} == {"maml", "fomaml", "imaml"}
    assert all(row["seconds"] > 0 and row["bytes"] > 100 and row["equivalents"] > 0 for row in rows)
    errors = {row["setting"]: row["error"] for row in rows}
    assert max(error for name, error in errors.items() if name.startswith("MAML")) < 1e-5
    assert min(error for name, error in errors.items() if not name.startswith("MAML")) > 1e-3
    lean = {"MAML, chunk_size=1, checkpoints=2", "MAML, chunk_size=1, storage='disk'"}
    assert {"MAML", "MAML, chunk_size=1", *lean} <= {row["setting"] for row in rows}
    printed = capsys.readouterr().out
    assert "FOMAML, chunk_size=1" in printed and "iMAML: use" in printed


def test_a_setting_that_recomputes_is_measured_where_it_may_pay(run):
    code, rows = run("user_bench:deep", "--strategies", "fomaml")
    sizes = {row["setting"]: row["bytes"] for row in rows}
    assert code == 0 and list(sizes)[-1] == "FOMAML, chunk_size=1, recompute=[Layer]"
    assert sizes["FOMAML, chunk_size=1, recompute=[Layer]"] < sizes["FOMAML, chunk_size=1"]


def test_the_inner_loop_of_a_given_engine_and_fixed_options_are_kept(run):
    _, rows = run("user_bench:with_engine", "--strategies", "maml", "fomaml", "--chunk-size", "1")
    assert [row["setting"] for row in rows] == ["MAML", "MAML, hvp='forward-over-reverse'", "FOMAML"]
    biased = rows[2]["error"]
    _, shorter = run("user_bench:with_engine", "--strategies", "fomaml", "--inner-steps", "1")
    assert shorter[0]["error"] < biased


def test_an_inner_loop_without_derivative_leaves_the_exact_strategy_out(run, capsys):
    code, rows = run("user_bench:with_newton")
    assert code == 0 and {row["strategy"] for row in rows} == {"fomaml", "imaml"}
    assert all(row["seconds"] > 0 and row["error"] is None for row in rows)
    assert "MAML is left out: MAML differentiates" in capsys.readouterr().out


def test_a_setting_that_fails_is_a_row_with_its_reason(run, capsys):
    code, rows = run("user_bench:without_forward_derivative", "--strategies", "maml")
    reasons = {row["setting"]: row["reason"] for row in rows}
    assert code == 0 and reasons.pop("MAML, hvp='forward-over-reverse'") == "failed"
    assert set(reasons.values()) == {None}
    assert "MAML, hvp='forward-over-reverse' failed: " in capsys.readouterr().out


def test_a_strategy_that_a_learned_step_size_is_not_for(run, capsys):
    code, rows = run("user_bench:with_learned_step", "--strategies", "maml", "fomaml")
    assert code == 0
    assert {(row["strategy"], row["seconds"] is None) for row in rows} == {("maml", False), ("fomaml", True)}
    printed = capsys.readouterr().out
    assert "FOMAML: no setting runs." in printed and "The meta-gradient for the meta-parameter 'log_lr'" in printed


def test_a_meta_parameter_without_effect_is_refused_in_every_setting(run, capsys):
    code, rows = run("user_bench:with_unused", "--strategies", "maml")
    captured = capsys.readouterr()
    assert code == 2 and not rows and "'log_lr' is zero" in captured.err and "MAML: use" not in captured.out


def test_a_bilevel_problem_whose_inner_variables_are_plain_tensors(run):
    code, rows = run("user_bench:ridge", "--strategies", "maml", "imaml")
    assert code == 0 and all(row["equivalents"] > 0 and row["failure"] is None for row in rows)
    assert max(row["error"] for row in rows if row["strategy"] == "maml") < 1e-5


def test_a_model_in_float32_alone_has_times_and_no_error(run, capsys):
    code, rows = run("user_bench:in_float32_alone", "--strategies", "fomaml")
    assert code == 0 and all(row["seconds"] > 0 and row["error"] is None for row in rows)
    assert "failed: in float64, " in capsys.readouterr().out


def test_figures_are_files_of_their_own_too(run, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "every-setting-of-before.png").write_bytes(b"")
    run("user_bench:make", "--strategies", "fomaml")
    assert len(list((tmp_path / "out").glob("*.png"))) == 2
    for name in ("memory", "error"):
        content = (tmp_path / "out" / f"every-setting-{name}-against-time.png").read_bytes()
        assert content.startswith(b"\x89PNG")


def test_settings_over_the_limit_are_not_timed(run, capsys):
    _, rows = run("user_bench:make", "--strategies", "fomaml", "--memory", "0.00001")
    assert all(row["seconds"] is None and row["reason"] == "over 1e-05 MB" for row in rows)
    assert "FOMAML: no setting stays within 1e-05 MB." in capsys.readouterr().out


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ([], "Expected a problem as module:function"),
        (["user_bench:make", "--strategies"], "--strategies needs at least one"),
        (["user_bench:make", "--strategies", "maml", "--cg-steps", "3"], "--cg-steps applies to none of maml. Got 3"),
        (["user_bench:make", "--memory", "-1"], "--memory must be more than 0 MB. Got -1"),
        (["user_bench:make", "--threads", "0"], "--threads must be at least 1. Got 0"),
        (["user_bench:fails"], "shapes cannot be multiplied"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(run, capsys, args, message):
    assert run(*args)[0] == 2
    captured = capsys.readouterr()
    assert message in captured.err and captured.err.count("\n") == 1


def test_a_folder_that_cannot_be_written_is_said_before_anything_is_measured(run, tmp_path, monkeypatch, capsys):
    (tmp_path / "out").write_text("")
    monkeypatch.setattr("imaml.cli._bench.measure", None)
    assert main(["bench", "user_bench:make", "--out", str(tmp_path / "out")]) == 2
    expected = f"imaml: The run folder {tmp_path / 'out'} cannot be written (File exists). Name another.\n"
    assert capsys.readouterr().err == expected


def cost(setting, seconds, size, spread=0.0):
    return Cost(strategy="maml", setting=setting, seconds=seconds, spread=spread, bytes=size)


def test_advice_prefers_the_leaner_of_two_that_are_as_fast():
    alike = [cost("quick", 1.0, 9_000_000, 0.2), cost("lean", 1.1, 5_000_000), cost("slow", 3.0, 1_000_000)]
    assert list(_advice(alike, None)) == ["MAML: use lean (1100 ms, 5 MB); the leanest is slow (3000 ms, 1 MB)."]
    apart = [cost("quick", 1.0, 9_000_000, 0.05), alike[1]]
    assert next(_advice(apart, 20)).startswith("MAML: use within 20 MB quick (1000 ms, 9 MB); the leanest is lean")


def test_the_page_renders(run, tmp_path):
    chromium = shutil.which("chromium")
    if chromium is None:
        pytest.skip("chromium is not installed: the page cannot be looked at.")
    run("user_bench:make", "--strategies", "fomaml")
    page = (tmp_path / "out" / "report.html").read_text()
    assert page.count("data:image/png;base64,") == 4  # two figures, light and dark
    shot = tmp_path / "shot.png"
    command = [chromium, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--window-size=1100,1400"]
    command += [
        f"--user-data-dir={tmp_path / 'profile'}",
        f"--screenshot={shot}",
        (tmp_path / "out/report.html").as_uri(),
    ]
    subprocess.run(command, check=True, capture_output=True, timeout=120)
    pixels = imread(shot)[..., :3]
    assert pixels.shape[:2] == (1400, 1100)
    colourful = (pixels.max(-1) - pixels.min(-1) > 0.3).any(-1).sum()
    assert colourful > 10  # rows with coloured points: the figures are there
