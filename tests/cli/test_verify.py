"""`imaml verify`: a table, the causes, and the exit code."""

import re
import sys

import pytest
import torch

from imaml._curvature.exact_products import ReverseOverReverse
from imaml.cli import _built_in, main
from tests.cli.factory import FACTORY

MODULE = (
    FACTORY
    + """
def first_order(objective, tasks):
    from imaml import FOMAML
    return FOMAML(inner=GradientDescent(lr=0.1, steps=3)).value_and_grad(objective, tasks)[1]

def with_engine():
    return *make(), MAML(inner=GradientDescent(lr=0.2, steps=2))

def with_function():
    return *make(), first_order

def linear():
    objective, tasks = make()
    return Objective(nn.Linear(2, 2), lambda output, target: output.mean()), tasks

def with_class():
    return *make(), MAML

def with_fault():
    def mine(objective, tasks):
        raise KeyError("mine")
    return *make(), mine

def as_list():
    objective, tasks = make()
    return objective, list(tasks)

def fails():
    raise KeyError("no data")

def three():
    return 3

def swapped():
    return make()[::-1]

def no_tasks():
    return make()[0], [1, 2]

number = 3
"""
)


@pytest.fixture
def problems(tmp_path, monkeypatch):
    """A folder with the module `its_problems`."""
    (tmp_path / "its_problems.py").write_text(MODULE)
    (tmp_path / "broken.py").write_text("import nowhere_to_be_found\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.delitem(sys.modules, "its_problems", raising=False)


def verdicts(text):
    return dict(re.findall(r"^ +(\S[^\n]*?) +(passed|failed|inconclusive) ", text, re.MULTILINE))


def test_the_users_own_problem(problems, capsys):
    assert main(["verify", "its_problems:make"]) == 0
    out = capsys.readouterr().out
    assert verdicts(out) == dict.fromkeys(["products", "MAML", "FOMAML", "iMAML"], "passed")
    assert "4 passed" in out and "order 2.0" in out


@pytest.mark.parametrize("name", ["with_engine", "as_list"])
def test_an_engine_of_the_problem_and_a_list_of_tasks(problems, capsys, name):
    options = [] if name == "with_engine" else ["--strategy", "maml", "--inner-steps", "2"]
    assert main(["verify", f"its_problems:{name}", *options]) == 0
    assert verdicts(capsys.readouterr().out) == dict.fromkeys(["products", "MAML"], "passed")


def test_a_strategy_that_refuses_the_problem_is_left_out(problems, capsys):
    assert main(["verify", "its_problems:ridge"]) == 0
    out = capsys.readouterr().out
    assert verdicts(out) == dict.fromkeys(["products", "MAML", "iMAML"], "passed")
    assert "FOMAML is left out: The meta-gradient for the meta-parameter 'log_decay' is zero" in out


def test_smoothness_is_said_when_it_is_asked_for(problems, capsys):
    assert main(["verify", "its_problems:with_engine", "--smoothness"]) == 0
    out = capsys.readouterr().out
    assert "MAML with GradientDescent, 2 steps, float32: smooth" in out and "2 passed" in out


INNER = ["--inner-lr", "0.1", "--inner-steps", "3"]


def test_a_wrong_function_is_exit_code_1_with_the_cause(problems, capsys):
    assert main(["verify", "its_problems:with_function", "--strategy", "maml", *INNER]) == 1
    out = capsys.readouterr().out
    assert verdicts(out) == {"products": "passed", "first_order": "failed"}
    assert "first_order: failed: first-order" in out and "1 passed, 1 failed" in out
    assert main(["verify", "its_problems:with_function", "--strategy", "fomaml", *INNER]) == 0


def test_an_unconverged_implicit_gradient_is_exit_code_1(problems, capsys):
    assert main(["verify", "its_problems:make", "--strategy", "imaml", "--inner-steps", "1"]) == 1
    assert "iMAML: failed: " in capsys.readouterr().out


def test_no_verdict_is_said_and_does_not_fail(problems, capsys):
    assert main(["verify", "its_problems:linear", "--strategy", "fomaml"]) == 0
    out = capsys.readouterr().out
    assert verdicts(out)["products"] == "inconclusive" and "products: inconclusive: the Hessian is zero" in out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["its_problems"], "module:function"),
        (["nowhere:make"], r"nowhere cannot be imported \(ModuleNotFoundError: .*in the folder that holds it"),
        (["broken:make"], "nowhere_to_be_found"),
        (["its_problems:absent"], "has no function 'absent'"),
        (["its_problems:number"], "has no function 'number'"),
        (["its_problems:fails"], r"failed \(KeyError: 'no data'\)"),
        (["its_problems:three"], r"must return \(objective, tasks\).*Got int"),
        (["its_problems:swapped"], "must return an Objective"),
        (["its_problems:no_tasks"], "Expected a TaskBatch or a list of Task"),
        (["its_problems:with_function"], "Say what it claims to compute by --strategy"),
        (["its_problems:with_engine", "--inner-lr", "0.1"], "--inner-lr does not apply"),
        (["its_problems:make", "--strategy", "maml", "--cg-steps", "3"], "--cg-steps does not apply"),
        (["its_problems:with_class"], "Got the class MAML: return an instance"),
        (["its_problems:with_fault", "--strategy", "maml", *INNER], r"^imaml: mine failed \(KeyError: 'mine'\)"),
        (["its_problems:with_function", "--strategy", "maml", *INNER, "--cg-steps", "3"], "--cg-steps does not apply"),
        (["its_problems:make", "--adapt", "2"], "--adapt does not apply: the problem's objective says what adapts"),
        (["its_problems:with_unused"], "The meta-gradient for the meta-parameter 'log_lr' is zero"),
        (["its_problems:make", "--tolerance", "0"], "`tolerance` must be positive"),
        (["--inner-steps", "3"], "--inner-steps does not apply"),
        (["--smoothness"], "--smoothness is about the inner training of a strategy on your problem.*Got none"),
        (["its_problems:with_function", "--smoothness"], "--smoothness is about.*Got a function"),
    ],
)
def test_bad_input_is_one_sentence_and_exit_code_2(problems, capsys, options, message):
    assert main(["verify", *options]) == 2
    captured = capsys.readouterr()
    assert re.search(message, captured.err) and captured.err.count("\n") == 1 and "Traceback" not in captured.err


def test_the_built_in_problems(monkeypatch, capsys):
    few = {name: _built_in.BUILT_IN[name] for name in ("MLP", "tied, unused, frozen")}
    monkeypatch.setattr("imaml.cli._verify.BUILT_IN", few)
    assert main(["verify", "--strategy", "maml"]) == 0
    found = verdicts(capsys.readouterr().out)
    expected = [f"{model}: {what}" for model in few for what in ("products", "MAML")]
    assert found == dict.fromkeys([*expected, *(f"{name}: MAML" for name in _built_in.INNER)], "passed")


def test_a_damped_engine_has_a_row_of_its_own_and_one_for_its_bias(monkeypatch, capsys):
    monkeypatch.setattr("imaml.cli._verify.BUILT_IN", {})
    assert main(["verify", "--strategy", "imaml"]) == 0
    out = capsys.readouterr().out
    assert verdicts(out) == {"MLP, tanh: iMAML, damped": "passed"}
    (bias,) = re.findall(r"MLP, tanh: iMAML, damped: bias +measured +(\S+)", out)
    assert 0.3 < float(bias) < 0.6  # about delta / (1 + delta), with lambda = 10


def test_a_broken_engine_fails_on_the_built_in_problems(monkeypatch, capsys):
    original = ReverseOverReverse.__call__

    def broken(self, w, *, mixed=False, into=None):
        product, fixed = original(self, w, mixed=mixed)
        return 1.01 * product, fixed

    monkeypatch.setattr(ReverseOverReverse, "__call__", broken)
    monkeypatch.setattr("imaml.cli._verify.BUILT_IN", {"MLP": _built_in.BUILT_IN["MLP"]})
    assert main(["verify", "--strategy", "maml"]) == 1
    assert set(verdicts(capsys.readouterr().out).values()) == {"failed"}


def test_the_built_in_problems_are_reproducible_and_leave_the_global_generator():
    before = torch.get_rng_state()
    (one, tasks), (other, _) = (_built_in.problem("transformer", 3) for _ in range(2))
    assert torch.equal(torch.get_rng_state(), before) and len(tasks) == _built_in.TASKS
    assert all(torch.equal(p, other.parameters()[n]) for n, p in one.parameters().items())
