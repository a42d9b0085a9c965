"""What happens where a private part of torch is gone, or torch warns of its own deprecations."""

import ast
import importlib.util
import os
import re
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import vmap
from torch.nn.utils import parametrizations

import imaml._torch
from imaml import MAML, CompileWarning, GradientDescent, Objective
from imaml._objective.exact import check_twice_differentiable
from imaml._objective.faithful import Survey, faithful
from tests.engine.cases import classification
from tests.oracles import relative_error

ROOT = Path(__file__).parents[2]
INNER = GradientDescent(lr=0.2, steps=3)


class Tanh(torch.autograd.Function):
    """With a second derivative, and a rule for vmap."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x):
        return torch.tanh(x)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(output)

    @staticmethod
    def backward(ctx, grad):
        (y,) = ctx.saved_tensors
        return grad * (1 - y * y)


def _loaded_anew():
    """The file of private names, once more, as if imaml were imported now."""
    spec = importlib.util.spec_from_file_location("loaded_anew", imaml._torch.__file__)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _network(*middle):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 5), *middle, nn.Tanh(), nn.Linear(5, 3)).double()


def _gradient(model, buffers=None, **options):
    torch.manual_seed(1)
    objective = Objective(model, F.cross_entropy, buffers=buffers)
    return MAML(inner=INNER, **options).value_and_grad(objective, classification((4,)))[1]


@pytest.mark.parametrize(
    ("owner", "name"),
    [
        (torch, "_weight_norm"),
        (torch._C._functorch, "is_functorch_wrapped_tensor"),
        (torch.utils._python_dispatch, "TorchDispatchMode"),
        (torch.utils._pytree, "tree_map"),
        (torch.utils.checkpoint, "CheckpointFunction"),
        (torch.utils.checkpoint, "_checkpoint_without_reentrant_generator"),
        (torch.utils.checkpoint, "_CheckpointFrame"),
    ],
    ids=str,
)
def test_without_what_keeps_results_right_nothing_is_imported(owner, name, monkeypatch):
    monkeypatch.delattr(owner, name)
    with pytest.raises(ImportError, match=rf"(?s)such as 2\.9 to 2\.15\. Got torch .*{name}.*install another torch"):
        _loaded_anew()


def test_a_recomputation_that_gets_by_is_refused(monkeypatch):
    for name, instead in imaml._torch._INSTEAD.items():
        if instead is imaml._torch._plain:
            makes_a_frame = lambda *args, **kwargs: torch.utils.checkpoint._CheckpointFrame()  # noqa: E731
            monkeypatch.setitem(imaml._torch._INSTEAD, name, makes_a_frame)
    monkeypatch.setattr(imaml._torch, "_INNER", None)
    for functions in (imaml._torch._INSTEAD, imaml._torch._STAND_INS):
        monkeypatch.delitem(functions, imaml._torch._DECORATED, raising=False)
    with faithful(Survey.of(None)), pytest.raises(RuntimeError, match="in a way that is not known"):
        torch.utils.checkpoint.checkpoint(torch.tanh, torch.ones(2), use_reentrant=False)


@pytest.mark.parametrize("hvp", ["reverse-over-reverse", "forward-over-reverse"])
def test_without_the_stack_of_transforms_buffers_are_copied_in_every_pass(hvp, monkeypatch):
    model = _network(nn.BatchNorm1d(5))
    expected = _gradient(model, "batch", hvp=hvp)
    monkeypatch.delattr(torch._C._functorch, "get_interpreter_stack")
    assert imaml._torch.is_transformed()
    assert relative_error(_gradient(model, "batch", hvp=hvp), expected) <= 1e-12


def test_without_the_switch_vmap_warns_as_it_does(monkeypatch):
    monkeypatch.delattr(torch._C._functorch, "_set_vmap_fallback_warning_enabled", raising=False)
    assert relative_error(_gradient(_network()), _gradient(_network())) <= 1e-12


def test_without_the_parts_of_vmap_vmap_itself_is_used(monkeypatch):
    expected, calls, vmap = _gradient(_network()), [], torch.func.vmap
    monkeypatch.setattr(imaml._torch, "_nesting", None)
    monkeypatch.setattr(torch.func, "vmap", lambda *args, **options: calls.append(1) or vmap(*args, **options))
    assert relative_error(_gradient(_network()), expected) <= 1e-12 and calls


def test_without_the_number_of_nodes_every_graph_is_looked_through(monkeypatch):
    looks = []
    monkeypatch.setattr("imaml._curvature.exact_products.check_twice_differentiable", looks.append)
    expected = _gradient(_network(), linearize=False)
    once = len(looks)
    monkeypatch.delattr(torch._C._autograd, "_get_sequence_nr")
    assert relative_error(_gradient(_network(), linearize=False), expected) <= 1e-12
    assert len(looks) - once > once > 0


@pytest.mark.parametrize("gone", [(), ("_SpectralNorm",)], ids=["known", "gone"])
def test_spectral_norm_is_known_by_its_class_or_by_its_iterations(gone, monkeypatch):
    norms = [
        parametrizations.spectral_norm(nn.Linear(3, 2)).parametrizations.weight[0],
        *nn.utils.spectral_norm(nn.Linear(3, 2))._forward_pre_hooks.values(),
    ]
    for name in gone:
        monkeypatch.delattr(parametrizations, name)
    fresh = _loaded_anew()
    assert all(fresh.is_spectral_norm(norm) for norm in norms)
    assert not fresh.is_spectral_norm(nn.Linear(3, 2))


def test_a_custom_function_under_vmap_is_not_trusted_and_another_one_is():
    x = torch.randn(3, 2, dtype=torch.double, requires_grad=True)
    plain, vectorised = Tanh.apply(x), vmap(Tanh.apply)(x)  # the nodes end with them
    check_twice_differentiable([plain.grad_fn])
    with pytest.raises(RuntimeError, match="does not support double backward"):
        check_twice_differentiable([vectorised.grad_fn])


def test_where_torch_does_not_tell_which_are_rewritten_no_custom_function_is_trusted(monkeypatch):
    x = torch.randn(3, 2, dtype=torch.double, requires_grad=True)
    known, custom = torch.tanh(x), Tanh.apply(x)
    check_twice_differentiable([known.grad_fn])
    monkeypatch.delattr(torch._functorch, "autograd_function")
    check_twice_differentiable([known.grad_fn])
    with pytest.raises(RuntimeError, match="does not support double backward"):
        check_twice_differentiable([custom.grad_fn])


@pytest.mark.filterwarnings("ignore::imaml.CompileWarning")
def test_without_a_look_at_traces_compilation_gives_the_same_or_is_given_up(monkeypatch):
    expected = _gradient(_network())
    monkeypatch.setattr("imaml._losses.replay.is_traced", lambda: False)
    monkeypatch.setattr("torch._inductor.compile", lambda graph, inputs: graph)
    assert relative_error(_gradient(_network(), compile=True), expected) <= 1e-12


def test_without_a_compiler_a_call_warns_and_runs_uncompiled(monkeypatch):
    expected = _gradient(_network())
    monkeypatch.delattr(torch, "_inductor", raising=False)
    monkeypatch.setitem(sys.modules, "torch._inductor", None)
    with pytest.warns(CompileWarning, match="the loss cannot be compiled"):
        found = _gradient(_network(), compile=True)
    assert relative_error(found, expected) <= 1e-12


def test_without_its_signs_no_module_is_compiled_and_no_profiler_is_on(monkeypatch):
    with warnings.catch_warnings(action="ignore"):  # of torch's own
        compiled = torch.compile(nn.Linear(2, 2))
    assert imaml._torch.is_compiled(compiled)
    with torch.profiler.profile():
        assert imaml._torch.is_profiling()
    monkeypatch.delattr(nn.Module, "_compiled_call_impl")
    monkeypatch.delattr(torch.autograd.profiler, "_is_profiler_enabled")
    assert not imaml._torch.is_compiled(nn.Linear(2, 2)) and not imaml._torch.is_profiling()


def test_forward_over_reverse_warns_of_nothing():
    """In a process of its own, since torch warns at the first use of forward AD alone; verify's suspects use it too."""
    program = """
import torch
from torch import nn
from imaml import GradientDescent, MAML, Objective, TaskBatch
x = torch.randn(2, 3, 4)
model = nn.Linear(4, 4)
engine = MAML(inner=GradientDescent(lr=0.1, steps=2), hvp="forward-over-reverse")
print(engine(Objective(model, nn.functional.mse_loss), TaskBatch(support=(x, x), query=(x, x))).report.hvp_mode)
"""
    path = os.pathsep.join([str(ROOT), str(ROOT / "solvers")])
    run = subprocess.run(
        [sys.executable, "-W", "error", "-c", program],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0 and run.stdout.strip() == "forward-over-reverse", run.stderr


def test_private_parts_of_torch_stand_in_one_file():
    found = []
    for file in sorted([*(ROOT / "imaml").rglob("*.py"), *(ROOT / "solvers").rglob("*.py")]):
        for node in ast.walk(ast.parse(file.read_text())):
            match node:
                case ast.Import(names=aliases):
                    names = [alias.name for alias in aliases]
                case ast.ImportFrom(module=str(module), names=aliases, level=0):
                    names = [f"{module}.{alias.name}" for alias in aliases]
                case ast.Attribute():
                    names = [ast.unparse(node)]
                case _:
                    continue
            private = [name for name in names if re.fullmatch(r"torch[\w.]*\._(?!_)[\w.]*", name)]
            found += [f"{file.relative_to(ROOT)}:{node.lineno}: {name}" for name in private]
    assert {line.partition(":")[0] for line in found} == {"imaml/_torch.py"}, found
