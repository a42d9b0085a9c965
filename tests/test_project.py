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
        {"PIL", "fontTools", "hypothesis", "jinja2", "matplotlib", "pooch", "pytest", "rich", "scipy", "tyro"}
        | {"tensorboard", "wandb", "yaml"}
    )


def test_the_core_requires_torch_and_numpy_alone():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert {re.match(r"[\w-]+", line)[0] for line in project["dependencies"]} == {"torch", "numpy"}


def test_the_core_imports_torch_numpy_and_the_standard_library_alone():
    """Whatever the line: within functions too, which importing does not reach."""
    core = sys.stdlib_module_names | {"imaml", "imaml_solvers", "numpy", "torch"}
    of_extras = {"cli", "testing"}  # data sets, texts and saved models import theirs by `optional`
    found = {
        (module, file.relative_to(ROOT).as_posix())
        for package in ("imaml", "solvers/imaml_solvers")
        for file in sorted((ROOT / package).rglob("*.py"))
        if file.relative_to(ROOT / package).parts[0] not in of_extras
        for _, module in imported(file)
    }
    assert {(module, file) for module, file in found if module not in core} == {
        ("scipy", "solvers/imaml_solvers/_scipy.py")
    }


def test_without_scipy_its_solver_alone_is_missing():
    program = """
import sys
sys.modules["scipy"] = None
import imaml, imaml.verify
imaml.MAML(inner=imaml.GradientDescent(lr=0.1, steps=5), checkpoints=1)
try:
    imaml.ScipySolver()
except ImportError as error:
    print(error)
"""
    path = os.pathsep.join([str(ROOT), str(ROOT / "solvers")])
    run = subprocess.run(
        [sys.executable, "-W", "error", "-c", program],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout == "ScipySolver needs scipy: pip install 'imaml[scipy]'\n"


def test_importing_is_quick(loaded):
    """What takes a tenth of a second and more to import, and is not always needed."""
    slow = {"scipy.sparse", "sympy", "torch._dynamo", "torch._inductor", "torch.distributed.tensor"}
    assert loaded.isdisjoint(slow)


def imported(file):
    """Line and top-level name of every module that a file imports by its name."""
    for node in ast.walk(ast.parse(file.read_text())):
        match node:
            case ast.Import(names=aliases):
                yield from ((node.lineno, alias.name.partition(".")[0]) for alias in aliases)
            case ast.ImportFrom(module=str(module), level=0):
                yield node.lineno, module.partition(".")[0]


def test_the_solvers_know_nothing_of_meta_learning():
    allowed = sys.stdlib_module_names | {"imaml_solvers", "numpy", "scipy", "torch"}
    for file in sorted((ROOT / "solvers").rglob("*.py")):
        for line, module in imported(file):
            assert module in allowed, f"{file}:{line}"


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


def test_the_release_is_the_same_everywhere():
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    releases = re.findall(r"(?m)^## \[(.+)\](?: - (\d{4}-\d\d-\d\d))?$", (ROOT / "CHANGELOG.md").read_text())
    assert releases[0] == ("Unreleased", "") and releases[1][0] == version
    citation = (ROOT / "CITATION.cff").read_text()
    assert re.findall(r"(?m)^version: (.+)$", citation) == [version]
    assert re.findall(r"(?m)^date-released: (.+)$", citation) == [releases[1][1]]


def test_links_and_classifiers_are_those_of_a_published_package():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    for label, url in project["urls"].items():
        assert len(label) <= 32 and re.match(r"https://arxiv\.org/abs/\d{4}\.\d{5}$", url)
    named = {line.removeprefix("Programming Language :: Python :: ") for line in project["classifiers"]}
    assert min(minor for minor in range(30) if f"3.{minor}" in named) == int(project["requires-python"][-2:])
    assert not any(line.startswith("License ::") for line in project["classifiers"])  # PEP 639: `license` says it


@pytest.mark.parametrize("form", sorted((ROOT / ".github").glob("ISSUE_TEMPLATE/*.yml")), ids=lambda path: path.name)
def test_the_forms_for_issues_are_what_github_reads(form):
    content = pytest.importorskip("yaml").safe_load(form.read_text())
    if form.name == "config.yml":
        assert content == {"blank_issues_enabled": True}
        return
    assert {"name", "description", "body"} <= {*content}
    ids = [field["id"] for field in content["body"]]
    assert len(ids) == len({*ids}) and all(field["attributes"]["label"] for field in content["body"])
    assert form.name != "bug.yml" or "imaml.verify.meta_gradient" in form.read_text()


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
