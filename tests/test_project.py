"""What the distribution promises: its public names, what it imports, and what its files may say."""

import ast
import inspect
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import imaml
import imaml.nn
import imaml.testing
import imaml_solvers

ROOT = Path(__file__).resolve().parents[1]

SOLVERS = {
    *("CG", "MINRES", "Dense", "Neumann", "NystromInverse", "ScipySolver"),
    *("Jacobi", "Nystrom", "Preconditioner"),
    *("LinearOperator", "LinearSolver", "Solution", "Status"),
}
ENGINE = {
    *("MetaGradient", "MAML", "FOMAML", "ImplicitMAML", "MetaResult", "Report", "Problem", "Pullback"),
    *("Objective", "Task", "TaskBatch", "Minibatches", "InnerState", "bilevel", "recompute"),
    *("InnerSolver", "InnerOptimizer", "GradientDescent", "Adam", "AdamW", "RMSprop", "NewtonCG", "TorchOptimizer"),
    *("LAMB", "Lion", "Muon", "NormalizedDescent", "SignDescent"),
    *("NonFiniteError", "DivergenceError", "CheckpointError", "SolverError"),
    *("SolverWarning", "PrecisionWarning", "DriftWarning", "CompileWarning"),
}

TESTING = {
    *("spectra", "spd_matrices", "QuadraticTasks", "quadratic_tasks", "small_models", "task_batches"),
    *("SolverConformance", "solver_conformance", "StrategyConformance", "strategy_conformance"),
}


def public_names(module):
    return {name for name, value in vars(module).items() if not (name.startswith("_") or inspect.ismodule(value))}


def test_the_public_names_of_imaml():
    assert public_names(imaml) == ENGINE | SOLVERS


def test_the_public_names_of_imaml_verify():
    assert public_names(imaml.verify) == {"Smoothness", "Verification", "hvp", "meta_gradient", "smoothness"}


def test_the_public_names_of_imaml_nn():
    assert public_names(imaml.nn) == {"chunked_cross_entropy"}


def test_the_public_names_of_imaml_solvers():
    assert public_names(imaml_solvers) == SOLVERS


def test_the_public_names_of_imaml_testing():
    assert public_names(imaml.testing) == TESTING


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    """The modules loaded by importing both packages from a folder whose own `solvers.py` must not run."""
    folder = tmp_path_factory.mktemp("elsewhere")
    (folder / "solvers.py").write_text("raise ImportError('the solvers.py of the user was imported')")
    program = "import sys, imaml, imaml_solvers; print(*sys.modules)"
    path = os.pathsep.join([str(ROOT), str(ROOT / "solvers")])
    run = subprocess.run(
        [sys.executable, "-W", "error", "-c", program],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    return set(run.stdout.split())


def test_importing_leaves_the_users_own_solvers_alone(loaded):
    assert "imaml_solvers" in loaded
    assert "solvers" not in loaded


def test_importing_needs_no_extra(loaded):
    assert loaded.isdisjoint(
        {"PIL", "fontTools", "hypothesis", "jinja2", "matplotlib", "pooch", "pytest", "rich", "tyro"}
        | {"tensorboard", "wandb", "yaml"}
    )


def test_importing_is_quick(loaded):
    """What takes a tenth of a second and more to import, and is not always needed."""
    slow = {"scipy.sparse", "sympy", "torch._dynamo", "torch._inductor", "torch.distributed.tensor"}
    assert loaded.isdisjoint(slow)


def test_the_solvers_know_nothing_of_meta_learning():
    allowed = sys.stdlib_module_names | {"imaml_solvers", "numpy", "scipy", "torch"}
    for file in sorted((ROOT / "solvers").rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text())):
            match node:
                case ast.Import(names=aliases):
                    modules = [alias.name for alias in aliases]
                case ast.ImportFrom(module=str(module), level=0):
                    modules = [module]
                case _:
                    continue
            assert {module.partition(".")[0] for module in modules} <= allowed, f"{file}:{node.lineno}"


def test_every_direct_dependency_is_pinned():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    needed = {*project["dependencies"], *sum(project["optional-dependencies"].values(), [])}
    pins = (ROOT / "constraints.txt").read_text()
    assert set(re.findall(r"(?m)^([\w-]+)==", pins)) == {re.match(r"[\w-]+", line)[0] for line in needed}


def test_the_releases_of_torch_that_are_tested_are_those_that_are_named():
    oldest, newest = (
        re.search(r"(?m)^torch==(\d+\.\d+)\.\d+$", (ROOT / f"constraints-{end}.txt").read_text())[1]
        for end in ("oldest", "newest")
    )
    assert f"torch>={oldest}" in tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    for file in ("imaml/_torch.py", "docs/architecture.md"):
        assert f"{oldest} to {newest}" in (ROOT / file).read_text()


def test_no_file_names_a_machine_or_a_registry():
    if not (ROOT / ".git").exists():
        pytest.skip("Not a git checkout: which files are committed cannot be known.")
    listing = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True)
    places = re.compile(
        rb"(?<![\w.])/(?:work|root|home/\w+|tmp/\w+|opt/\w+)/"
        rb"|(?:pypi|pythonhosted|npmjs)\.(?:org|com)\b|download\.pytorch\.org"
    )
    found = []
    for name in filter(None, listing.stdout.split("\0")):
        file = ROOT / name
        if file.is_file() and (match := places.search(file.read_bytes())):
            found.append(f"{name}: {match[0].decode()}")
    assert not found
