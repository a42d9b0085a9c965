"""`imaml plan`: the table, the advice, and mistakes."""

import sys

import pytest

from imaml.cli import main
from tests.cli.factory import FACTORY

MODULE = (
    FACTORY
    + """
def with_engine():
    return *make(), MAML(inner=GradientDescent(lr=0.2, steps=40), regularization=0.5)

def with_newton():
    return *make(), ImplicitMAML(inner=NewtonCG(steps=2))

def with_learned_step_size():
    objective, tasks = make()
    meta = {"lr": torch.tensor(0.1, requires_grad=True)}
    objective = Objective(objective.model, F.mse_loss, meta=meta)
    return objective, tasks, MAML(inner=GradientDescent(lr=lambda meta: meta["lr"], steps=2))

def with_function():
    return *make(), lambda objective, tasks: {}

def fails():
    raise OSError("no such file")
"""
)


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Run `imaml plan` on the module above; returns the exit code."""
    (tmp_path / "user_plan.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "120")

    def run(*args):
        sys.modules.pop("user_plan", None)
        return main(["plan", *args])

    return run


def test_every_strategy_has_settings_and_advice(run, capsys):
    assert run("user_plan:make", "--memory", "4GiB") == 0
    captured = capsys.readouterr()
    out = captured.out
    assert all(out.count(f"{name} ") >= 2 for name in ("MAML", "FOMAML", "iMAML"))
    assert "MAML: Use " in out and "iMAML: Use " in out and "Looking took" in out
    assert " no " not in out.split("Use ")[0] and captured.err == ""


def test_settings_that_recompute_are_listed(run, capsys):
    assert run("user_plan:deep", "--strategies", "maml", "--memory", "1kB") == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "The leanest is recompute=[Layer], " in out


def test_a_limit_and_options_that_are_given(run, capsys):
    args = ("user_plan:make", "--memory", "100B", "--strategies", "maml", "--checkpoints", "1", "--chunk-size", "1")
    assert run(*args) == 0
    out = capsys.readouterr().out
    assert "MAML: Nothing fits into 100 B. The leanest is MAML as it is with" in out
    assert "checkpoints=" not in out and "chunk_size=" not in out and "FOMAML  " not in out


def test_the_engine_of_the_problem_is_planned_as_it_is(run, capsys):
    assert run("user_plan:with_engine", "--strategies", "maml", "fomaml") == 0
    out = capsys.readouterr().out
    for name in ("MAML", "FOMAML"):  # 2 tasks of 40 steps and a query gradient
        row = next(line for line in out.splitlines() if line.split()[:1] == [name] and "as it is" in line)
        assert "82" in row.split()


def test_a_strategy_that_cannot_take_the_inner_loop_is_left_out(run, capsys):
    assert run("user_plan:with_newton", "--strategies", "maml", "fomaml") == 0
    out = capsys.readouterr().out
    assert "MAML is left out: MAML differentiates" in out and "FOMAML: Use" in out


def test_a_strategy_that_cannot_learn_the_meta_parameters_is_left_out(run, capsys):
    assert run("user_plan:with_learned_step_size", "--strategies", "maml", "fomaml") == 0
    out = capsys.readouterr().out
    assert "FOMAML is left out: The meta-gradient for the meta-parameter 'lr' is zero" in out and "MAML: Use" in out


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["user_plan:with_learned_step_size", "--strategies", "fomaml"], "meta-parameter 'lr' is zero"),
        ([], "Expected a problem as module:function. Got none."),
        (["user_plan:make", "--memory", "4 gigs"], '`memory` must be an amount such as "4GiB"'),
        (["user_plan:make", "--strategies"], "--strategies needs at least one strategy"),
        (["user_plan:make", "--adapt", "2"], "--adapt does not apply: the problem's objective says what adapts"),
        (["user_plan:make", "--strategies", "maml", "--cg-steps", "3"], "--cg-steps applies to none of maml. Got 3"),
        (["user_plan:with_function"], "Got the function <lambda>, which only `imaml verify` takes"),
        (["user_plan:make", "--threads", "0"], "--threads must be at least 1. Got 0"),
        (["user_plan:fails"], "user_plan:fails failed (OSError: no such file)"),
        (["user_plan:none"], "user_plan has no function 'none'"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(run, capsys, args, message):
    assert run(*args) == 2
    captured = capsys.readouterr()
    assert message in captured.err and captured.err.count("\n") == 1


def test_the_help_lists_it(capsys):
    with pytest.raises(SystemExit):
        main(["--help"])
    assert "plan" in capsys.readouterr().out
