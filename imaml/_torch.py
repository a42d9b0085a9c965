"""Every private part of torch that the library uses, and every message of torch's that it knows.

Tested with torch 2.9 to 2.15. A private name may be gone in the next release:

| name | what needs it | when it is gone |
|---|---|---|
| `torch.utils._pytree` | batches and outputs of any structure | ImportError |
| `_python_dispatch.TorchDispatchMode` | `imaml.measure` counts operations | ImportError |
| `is_functorch_wrapped_tensor` | no graph is left at the user's data | ImportError |
| `is_batchedtensor`, `get_unwrapped` | what requires grad is the same inside `vmap` | ImportError |
| `torch._weight_norm` | its wrong second derivative is replaced | ImportError |
| `CheckpointFunction` and the like | no recomputation with other parameters | ImportError |
| `_checkpoint_impl` | functions that `checkpoint` has decorated are recomputed | their activations are kept |
| `get_interpreter_stack`, `TransformType` | buffers are copied once a call | copied in every pass |
| `_add_batch_dim`, `_vmap_increment_nesting` and their like | `vmap` without its trees | `torch.func.vmap` |
| `maybe_get_level`, `maybe_get_bdim` and their like | an operation on all tasks at once | what `vmap` makes of it |
| `_engine_run_backward` | gradients without checks | with them |
| `_set_vmap_fallback_warning_enabled` | an operation that `vmap` runs in a loop is no matter | torch warns |
| `_get_sequence_nr` | equal graphs are looked through once | looked through every time |
| `aten._unsafe_view` | a trace whose products are transposed | AttributeError |
| `aten._to_copy` | `verify` knows what a model rounds to | ImportError |
| `_SpectralNorm`, `SpectralNorm` | `spectral_norm` is known | by `n_power_iterations` |
| `_forward_cls`, `autograd_function` | custom functions under `vmap` are known | none is trusted |
| `_get_dispatch_mode` and its keys | a trace sees no random state | as if there were no trace |
| `forward_ad._current_level` | convolutions of all tasks at once | by what `vmap` makes of them |
| `torch._inductor` | `compile=True` | it warns, and runs uncompiled |
| `_inductor.config` | compilation in a third of the time | a setting that is gone is left out |
| `_inductor.sizevars` | compilation in three quarters of the time | by `sympy.simplify` |
| `AsyncCompile`, `CppPythonBindingsCodeCache` | kernels are compiled as one file | each is compiled for itself |
| `torch._guards`, `FakeTensorMode`, `ShapeEnv` | what is compiled is kept on disk | compiled in every process |
| `_orig_mod`, `_compiled_call_impl` | compiled modules are known | torch's own error for them |
| `_is_profiler_enabled` | a forecast says that a profiler is in use | torch's own error for it |

What is wrong in silence without a name is an ImportError. `Tensor._version`, `Module._parameters`, `_buffers` and
`_forward_pre_hooks` are older than any release in question, and stay where they are used; so do the public names of
`torch.distributed`.
"""

from __future__ import annotations

import importlib.util
import sys
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cache, partial
from typing import Any, NamedTuple, NoReturn

import torch
import torch.utils.checkpoint
from torch import Tensor, nn
from torch.autograd import profiler
from torch.autograd.function import BackwardCFunction

try:
    CAST = torch.ops.aten._to_copy.default
    weight_norm = torch._weight_norm
    from torch._C._functorch import get_unwrapped, is_batchedtensor
    from torch._C._functorch import is_functorch_wrapped_tensor as is_functorch_wrapped_tensor
    from torch.utils._python_dispatch import TorchDispatchMode as TorchDispatchMode
    from torch.utils._pytree import TreeSpec as TreeSpec
    from torch.utils._pytree import register_pytree_node as register_pytree_node
    from torch.utils._pytree import tree_flatten as tree_flatten
    from torch.utils._pytree import tree_leaves as tree_leaves
    from torch.utils._pytree import tree_map as tree_map

    for _name in ("CheckpointFunction", "_checkpoint_without_reentrant_generator", "_CheckpointFrame"):
        getattr(torch.utils.checkpoint, _name)
except (ImportError, AttributeError) as error:
    raise ImportError(
        "imaml uses private parts of torch, without which results would be wrong. Expected a release of torch that has "
        f"them, such as 2.9 to 2.15. Got torch {torch.__version__} ({error}): install another torch or a newer imaml."
    ) from error

try:
    from torch.nn.utils.parametrizations import _SpectralNorm
    from torch.nn.utils.spectral_norm import SpectralNorm

    _SPECTRAL_NORMS: tuple[type, ...] = (_SpectralNorm, SpectralNorm)
except ImportError:
    _SPECTRAL_NORMS = (object,)

try:
    _load_decompositions = cache(torch._functorch.vmap.lazy_load_decompositions)  # type: ignore[attr-defined]
    _nesting: Any = torch._C._functorch
    for _name in ("_vmap_increment_nesting", "_vmap_decrement_nesting", "_add_batch_dim", "_remove_batch_dim"):
        getattr(_nesting, _name)
    for _name in ("maybe_current_level", "maybe_get_level", "maybe_get_bdim"):
        getattr(_nesting, _name)
    for _name in ("pop_dynamic_layer_stack", "push_dynamic_layer_stack"):
        getattr(_nesting, _name)
except (ImportError, AttributeError):
    _nesting = None

_warn_of_fallback: Any = getattr(torch._C._functorch, "_set_vmap_fallback_warning_enabled", lambda _: None)
_checkpoint: Any = torch.utils.checkpoint
_run_backward: Any = getattr(torch.autograd.graph, "_engine_run_backward", None)

LACKS_SECOND_DERIVATIVE = (
    "is not implemented",
    "once_differentiable",
    "double backward",
    "forward AD",
    "must implement the jvp",
    "must override the setup_context",
    "ZeroTensors are immutable",
    "don't support automatic differentiation",
    "being transformed by a functorch transform",
    "do not have strides",
    "would mutate a captured Tensor",
    "_efficientzerotensor",
)
"""What the errors say of operations without second derivatives, or without some mode of them. A message that torch has
changed reaches the user in place of finite differences."""


def is_out_of_memory(error: RuntimeError) -> bool:
    """Whether memory was short; by its message on a CPU. Not known, the tasks run one by one, which needs less."""
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)


def refuses_hooks(error: RuntimeError) -> bool:
    """Whether transforms of torch.func forbid hooks for saved tensors. Not known, the error reaches the user."""
    return "saved tensor hooks" in str(error)


def is_write_to_rows(error: RuntimeError) -> bool:
    """Whether the rows of `unbind` were written to. Not known, torch's own words reach the user."""
    return "of unbind" in str(error).lower()


def is_write_to_leaf(error: RuntimeError) -> bool:
    """Whether a leaf that requires grad was written to. Not known, torch's own words reach the user."""
    return "is being used in an in-place operation" in str(error)


def is_write_to_shared(error: RuntimeError) -> bool:
    """Whether a tensor was written to that all tasks share. Not known, torch's own words reach the user."""
    return "written-to tensor refers to a single memory location" in str(error)


def of_all_tasks(tensor: Tensor) -> Tensor:
    """The tensor of all tasks, of which `vmap` shows that of one; any other as it is."""
    while is_batchedtensor(tensor):
        tensor = get_unwrapped(tensor)
    return tensor


def requires_grad(tensor: Tensor) -> bool:
    """Whether that of all tasks requires grad, without a mode that takes this for a question of the model's."""
    with torch._C.DisableTorchFunction():
        return of_all_tasks(tensor).requires_grad


def is_transformed() -> bool:
    """Whether a transform of torch.func other than `vmap` is active; True where torch does not say."""
    functorch = torch._C._functorch
    try:
        return any(level.key() != functorch.TransformType.Vmap for level in functorch.get_interpreter_stack() or ())
    except AttributeError:
        return True


def inside_transform() -> bool:
    """Whether a transform other than `vmap` runs, or a trace: they refuse writes to outer tensors, and end theirs."""
    return is_traced() or is_transformed()


def vectorised(function: Callable[[list[Tensor]], Sequence[Tensor]], rows: Sequence[Tensor], size: int) -> list[Tensor]:
    """What `torch.func.vmap` makes of a function of tensors, without the trees that it walks; draws differ by row.

    There is no warning of an operation that runs row by row, which the user cannot change.

    Args:
        function: Takes one row of each tensor.
        rows: Tensors `(size, ...)`.
        size: How many rows.

    Returns:
        Tensors `(size, ...)`.
    """
    _warn_of_fallback(False)
    try:
        if _nesting is None:
            found: Sequence[Tensor] = torch.func.vmap(function, randomness="different")(list(rows))
            return list(found)
        _load_decompositions()
        level = _nesting._vmap_increment_nesting(size, "different")
        try:
            outputs = function([_nesting._add_batch_dim(row, 0, level) for row in rows])
            return [_nesting._remove_batch_dim(output, level, size, 0) for output in outputs]
        finally:
            _nesting._vmap_decrement_nesting()
    finally:
        _warn_of_fallback(True)


def at_once(
    function: Callable[..., Tensor | None], tensors: Sequence[Tensor], places: Sequence[int], place: int
) -> Tensor | None:
    """Call a function with the tensors of all tasks, of which `vmap` shows those of one, and outside of it.

    Args:
        function: Takes the tensors of all tasks, and returns one.
        tensors: Tensors of one task.
        places: Which dimension is that of the tasks in each of those of all.
        place: Which one is in what the function returns.

    Returns:
        What one task has of it; None where it has returned None, and without a call unless a single transform is
        active, a `vmap` over all of the tensors.
    """
    if _nesting is None or not is_batchedtensor(tensors[0]) or _nesting.maybe_current_level() != 1:
        return None
    own = []
    for tensor, there in zip(tensors, places, strict=True):
        if _nesting.maybe_get_level(tensor) != 1:
            return None
        here, whole = _nesting.maybe_get_bdim(tensor), get_unwrapped(tensor)
        own.append(whole if here == there else whole.movedim(here, there))
    level = _nesting.pop_dynamic_layer_stack()
    try:
        found = function(*own)
    finally:
        _nesting.push_dynamic_layer_stack(level)
    return None if found is None else _nesting._add_batch_dim(found, place, 1)


def gradient(
    outputs: Sequence[Any], inputs: Sequence[Tensor], cotangents: Sequence[Tensor], *, retain: bool, create: bool
) -> tuple[Tensor | None, ...]:
    """`torch.autograd.grad` without its checks, which take longer than the derivative of a small layer.

    Args:
        outputs: Tensors, or edges of a graph.
        inputs: What is differentiated by.
        cotangents: One for each output, in its shape and dtype.
        retain: Whether the graph is needed again.
        create: Whether the gradient can be differentiated again.

    Returns:
        The gradients, None where there is no path.
    """
    if _run_backward is None:
        return torch.autograd.grad(
            outputs, inputs, cotangents, retain_graph=retain, create_graph=create, allow_unused=True
        )
    found: tuple[Tensor | None, ...] = _run_backward(
        tuple(outputs), tuple(cotangents), retain, create, tuple(inputs), allow_unreachable=True, accumulate_grad=False
    )
    return found


def sequence_number() -> float:
    """How many nodes of graphs this thread has made; NaN, which equals nothing, where torch does not say."""
    try:
        return torch._C._autograd._get_sequence_nr()
    except AttributeError:
        return float("nan")


def is_along_tangents() -> bool:
    """Whether forward-mode derivatives are being taken; True where torch does not say."""
    return getattr(torch.autograd.forward_ad, "_current_level", 0) >= 0


def is_traced() -> bool:
    """Whether `make_fx` is tracing; False where torch does not say."""
    try:
        return torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.PROXY) is not None
    except AttributeError:
        return False


_trusted: set[type] = set()
"""Types of nodes that have a second derivative, as far as they have been met."""


def may_drop_second_derivative(node: Any) -> bool:
    """Whether a graph's node has, or may have, no second derivative, which autograd does not say.

    A custom `autograd.Function` that `vmap` has rewritten drops it without a trace. Which ones are rewritten, torch
    tells by the module of the class; where it does not, all custom ones count.

    Args:
        node: A `grad_fn`.

    Returns:
        Whether it is not to be trusted.
    """
    kind = type(node)
    if kind in _trusted:
        return False
    name = node.name().rsplit("::", 1)[-1]
    if name in ("Error", "DelayedError", "NotImplemented"):
        return True
    if not isinstance(node, BackwardCFunction):
        if kind.__name__ == name:  # it has one name, for all of its nodes
            _trusted.add(kind)
        return False
    rewrites = getattr(torch._functorch, "autograd_function", None)
    function = getattr(node, "_forward_cls", None)
    return rewrites is None or function is None or bool(function.__module__ == rewrites.__name__)


def is_spectral_norm(module: Any) -> bool:
    """Whether a module, or a hook, is a spectral_norm that updates vectors of its own; by their number if need be."""
    return hasattr(module, "n_power_iterations") and isinstance(module, _SPECTRAL_NORMS)


def is_sharded(tensors: Iterable[Tensor]) -> bool:
    """Whether any of these tensors is spread over processes."""
    kind = getattr(sys.modules.get("torch.distributed.tensor"), "DTensor", None)
    return kind is not None and any(isinstance(tensor, kind) for tensor in tensors)


def is_compiled(module: nn.Module) -> bool:
    """Whether a module is compiled. Not known, torch has no second derivative for it, and says so."""
    return hasattr(module, "_orig_mod") or getattr(module, "_compiled_call_impl", None) is not None


VIEWS = (torch.ops.aten.view.default, torch.ops.aten._unsafe_view.default)
"""Operations of a trace that want a tensor whose entries lie in their order."""


def compile_graph(graph: torch.fx.GraphModule, inputs: Sequence[Tensor]) -> Callable[..., Any]:
    """By TorchInductor, which takes a second to import; ImportError where there is none.

    What it makes is kept on disk, in `TORCHINDUCTOR_CACHE_DIR`, and is found there by other processes.

    Args:
        graph: Operations below autograd.
        inputs: Tensors of the shapes that it is compiled for.

    Returns:
        A function of tensors of these shapes.
    """
    from torch import _inductor as inductor  # noqa: PLC0415

    with _inductor_settings(), _quick_strides(), _one_translation_unit(), _with_cache(inputs) as given:
        compiled: Callable[..., Any] = inductor.compile(graph, given)
    return compiled


_INDUCTOR_SETTINGS = {
    # A fresh cache would compile six programs to try out what the processor says it can: 7 s.
    "cpp.vec_isa_ok": True,
    # Workers would import torch, for a few seconds each, to compile the only C++ file that there is.
    "compile_threads": 1,
    # That takes 5 s, once on a machine, and saves 1.3 s a file.
    "cpp_cache_precompile_headers": False,
}


def _inductor_settings() -> AbstractContextManager[Any]:
    """The settings that this release of torch has."""
    from torch._inductor import config  # noqa: PLC0415

    known = config.get_config_copy()
    patch: AbstractContextManager[Any] = config.patch({k: v for k, v in _INDUCTOR_SETTINGS.items() if k in known})
    return patch


@contextmanager
def _quick_strides() -> Iterator[None]:
    """Within it strides in polynomials are found by expansion: `sympy.simplify` takes a quarter of the Python time."""
    from torch._inductor import sizevars  # noqa: PLC0415

    module: Any = sizevars
    try:
        stride_at, simplify, sympy = module.stride_at, module.simplify_index_in_vec_range, module.sympy
        from torch.utils._sympy.functions import FloorDiv, ModularIndexing  # noqa: PLC0415
    except (ImportError, AttributeError):
        yield
        return

    def quick_stride(index: Any, var: Any) -> Any:
        if not isinstance(index, sympy.Expr) or not index.is_polynomial(var):
            return stride_at(index, var)
        return sympy.expand(index.subs(var, var + 1) - index)

    def only_divisions(index: Any, var: Any, vec_length: int) -> Any:
        return simplify(index, var, vec_length) if index.has(FloorDiv, ModularIndexing) else index

    module.stride_at, module.simplify_index_in_vec_range = quick_stride, only_divisions
    try:
        yield
    finally:
        module.stride_at, module.simplify_index_in_vec_range = stride_at, simplify


@contextmanager
def _with_cache(inputs: Sequence[Tensor]) -> Iterator[list[Any]]:
    """What to compile for: without an environment of shapes TorchInductor neither reads nor writes its cache."""
    try:
        from torch._guards import TracingContext, tracing  # noqa: PLC0415
        from torch._subclasses import FakeTensorMode  # noqa: PLC0415
        from torch.fx.experimental.symbolic_shapes import ShapeEnv  # noqa: PLC0415
    except ImportError:
        yield list(inputs)
        return
    mode = FakeTensorMode(shape_env=ShapeEnv())
    with tracing(TracingContext(mode)):
        yield [mode.from_tensor(tensor, static_shapes=True) for tensor in inputs]


@contextmanager
def _one_translation_unit() -> Iterator[None]:
    """Within it the kernels of a graph are compiled as one C++ file: each for itself takes half a second more."""
    try:
        from torch._inductor.async_compile import AsyncCompile  # noqa: PLC0415

        one, wait = AsyncCompile.cpp_pybinding, AsyncCompile.wait
    except (ImportError, AttributeError):
        yield
        return

    def collect(self: Any, argtypes: list[str], source_code: str) -> Any:
        return _Kernel(argtypes, source_code)

    def compile_all(self: Any, scope: dict[str, Any]) -> None:
        kernels = {name: value for name, value in scope.items() if isinstance(value, _Kernel)}
        try:
            scope.update(zip(kernels, _compiled_together(list(kernels.values())), strict=True))
        except Exception:  # of a release that binds kernels in another way: one by one, with its own errors
            scope.update({name: one(self, kernel.argtypes, kernel.source) for name, kernel in kernels.items()})
        wait(self, scope)

    compiler: Any = AsyncCompile
    compiler.cpp_pybinding, compiler.wait = collect, compile_all
    try:
        yield
    finally:
        compiler.cpp_pybinding, compiler.wait = one, wait


class _Kernel(NamedTuple):
    """The C++ source of a function `kernel`."""

    argtypes: list[str]
    source: str


def _compiled_together(kernels: Sequence[_Kernel]) -> list[Callable[..., Any]]:
    """The functions of one file, in which each kernel has a namespace of its own, and a Python module."""
    from torch._inductor.codecache import CppPythonBindingsCodeCache  # noqa: PLC0415

    class Together(CppPythonBindingsCodeCache):
        cache: dict[str, Any] = {}  # noqa: RUF012
        entry_function = "kernel0"

    includes, parts = dict[str, None](), list[str]()
    for i, kernel in enumerate(kernels):
        given = ", ".join(f"parse_arg<{t.replace('const ', '')}>(args, {n})" for n, t in enumerate(kernel.argtypes))
        binding = Together.suffix_template.format(
            arg_len=len(kernel.argtypes),
            call_entry_func=Together.call_entry_function.format(given),
            entry_func=f"kernel{i}",
            extra_parse_arg="",
        )
        lines = f"{kernel.source}\n{binding}".splitlines()
        includes |= {line.strip(): None for line in lines if line.lstrip().startswith("#include")}
        own = [line for line in lines if not line.lstrip().startswith("#include")]
        parts += [f"namespace n{i} {{", f"#define kernel kernel{i}", *own, "#undef kernel", "}"]
    if not kernels:
        return []
    first = Together.load_async("\n".join(["#define PY_SSIZE_T_CLEAN", *includes, *parts]))()
    modules, name = [first], first.__name__.rpartition(".")[0]
    for i in range(1, len(kernels)):
        spec: Any = importlib.util.spec_from_file_location(f"{name}.kernel{i}", first.__file__)
        modules.append(importlib.util.module_from_spec(spec))
        spec.loader.exec_module(modules[-1])
    return [getattr(module, f"kernel{i}") for i, module in enumerate(modules)]


def is_profiling() -> bool:
    """Whether a profiler is on."""
    return bool(getattr(profiler, "_is_profiler_enabled", False))


@cache
def load_forward_ad() -> None:
    """Let forward AD import, before its first use, a part of torch that warns of a deprecation of torch's own."""
    with warnings.catch_warnings(action="ignore"):
        torch.func.jvp(torch.sin, (torch.ones(()),), (torch.ones(()),))


def take_over(checkpoint: Callable[..., Any], attention: Callable[..., Any]) -> None:
    """Let `torch.utils.checkpoint.checkpoint` and attention, however they were imported, be computed in another way.

    Where torch has no hook for a checkpoint it calls its function and keeps what that saves. What recomputes all the
    same, by a way that is not known, raises RuntimeError. All threads share torch's modules: the last one gives them
    back.

    Args:
        checkpoint: Takes the function of a checkpoint and its arguments; the same in every call.
        attention: Takes what `F.scaled_dot_product_attention` takes; the same in every call.
    """
    with _taken.lock:
        if _taken.times == 0:
            members, _taken.checkpoint = vars(_checkpoint), checkpoint
            _taken.before = {name: members[name] for name in _INSTEAD}
            members.update(_STAND_INS)
            _taken.attention, _functional.scaled_dot_product_attention = (
                _functional.scaled_dot_product_attention,
                attention,
            )
            if _INNER is not None:
                _taken.hook = vars(_INNER).get(_HOOK)
                setattr(_INNER, _HOOK, _checkpointed)
        _taken.times += 1


def give_back() -> None:
    """Take back what `take_over` has done."""
    with _taken.lock:
        _taken.times -= 1
        if _taken.times == 0:
            vars(_checkpoint).update(_taken.before)
            _functional.scaled_dot_product_attention = _taken.attention
            if _INNER is not None:
                setattr(_INNER, _HOOK, _taken.hook)


def recompute_by_torch(
    again: Callable[[], AbstractContextManager[None]], function: Callable[..., Any], *args: Any
) -> Any:
    """Call a function by torch's own checkpoint, while torch's checkpoints are taken.

    It is recomputed in first derivatives, with the parameters that modules have when these are taken.

    Args:
        again: Makes the context within which the function is called again.
        function: Takes the arguments.
        args: Tensors, which are kept, and anything else.

    Returns:
        What the function returns.
    """
    own, before = _INNER or _checkpoint.checkpoint, _native.is_on
    _native.is_on = True
    try:
        return own(function, *args, use_reentrant=False, context_fn=lambda: (nullcontext(), again()))
    finally:
        _native.is_on = before


class _Taken:
    """How often torch's functions are taken over, and what they were."""

    def __init__(self) -> None:
        self.lock, self.times = threading.Lock(), 0
        self.checkpoint: Any = None
        self.before: dict[str, Any] = {}
        self.hook: Any = None
        self.attention: Any = None


class _Native(threading.local):
    """Whether a thread calls torch's own checkpoint."""

    is_on = False


_taken, _native = _Taken(), _Native()
_functional: Any = torch.nn.functional
_HOOK = "__dynamo_disable"
_INNER = getattr(torch.utils.checkpoint.checkpoint, "__wrapped__", None)
"""The undecorated function, of which the decorated one looks up at every call what to call in its place."""
_DECORATED = "_checkpoint_impl"
"""What a function calls that `checkpoint` has decorated, from torch 2.15."""
_OPTIONS = (
    "use_reentrant preserve_rng_state determinism_check debug early_stop respect_saved_tensors_hooks context_fn"
).split()


def _checkpointed(*args: Any, **kwargs: Any) -> Any:
    """`torch.utils.checkpoint.checkpoint`; all that its options say of how to recompute holds here anyway."""
    if not args and "function" not in kwargs:  # it decorates
        assert _INNER is not None
        return _INNER(**kwargs)
    options = {name: kwargs.pop(name) for name in _OPTIONS if name in kwargs}
    function, *own = args or [kwargs.pop("function")]
    return _decorated(function, own, kwargs, **options)


def _decorated(
    function: Callable[..., Any],
    args: Sequence[Any],
    kwargs: dict[str, Any],
    *,
    context_fn: Callable[..., Any] = torch.utils.checkpoint.noop_context_fn,
    **_: Any,
) -> Any:
    if context_fn is not torch.utils.checkpoint.noop_context_fn:
        name = getattr(function, "__qualname__", type(function).__name__)
        raise ValueError(
            f"The checkpoint of {name} has a `context_fn`, whose contexts derivatives of higher order cannot have. "
            "Expected none: leave it out, or call the function without a checkpoint."
        )
    return _taken.checkpoint(function, *args, **kwargs)


class _Plain:
    """In place of `CheckpointFunction`."""

    @staticmethod
    def apply(function: Callable[..., Any], preserve_rng_state: bool, *args: Any) -> Any:
        return function(*args)


def _plain(*args: Any, **kwargs: Any) -> Iterator[None]:
    """In place of the generator that prepares a recomputation, whatever its arguments: torch 2.15 has two of them."""
    yield


def _recomputed(*_: Any) -> NoReturn:
    """In place of what a recomputation is kept in: torch 2.15 kept the name of the generator, and used another."""
    raise RuntimeError(
        f"torch {torch.__version__} recomputes a checkpoint in a way that is not known, with other parameters. "
        "Expected a release such as 2.9 to 2.15: install one, or switch checkpoints off in the model."
    )


_INSTEAD: dict[str, Any] = {"CheckpointFunction": _Plain, "_CheckpointFrame": _recomputed} | {
    name: _plain for name in vars(_checkpoint) if name.startswith("_checkpoint_without_reentrant_generator")
}
if hasattr(_checkpoint, _DECORATED):
    _INSTEAD[_DECORATED] = _decorated
"""What is called in place of torch's own functions."""


def _called(name: str, *args: Any, **kwargs: Any) -> Any:
    return (_taken.before if _native.is_on else _INSTEAD)[name](*args, **kwargs)


_STAND_INS = {name: it if isinstance(it, type) else partial(_called, name) for name, it in _INSTEAD.items()}
"""What stands in torch's module: a thread that calls torch's own checkpoint finds its functions there."""
