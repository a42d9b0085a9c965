"""`imaml.nn.chunked_cross_entropy` against torch's own cross entropy on all logits at once."""

from functools import partial

import pytest
import torch
import torch.autograd.forward_ad as fwad
import torch.nn.functional as F
from torch import nn

from imaml import CG, FOMAML, MAML, Adam, GradientDescent, ImplicitMAML, Objective, TaskBatch
from imaml.measure import peak_memory
from imaml.nn import chunked_cross_entropy

F64 = torch.float64
CLASSES, WIDTH = 7, 5
OPTIONS = {
    "plain": {},
    "bias": {"bias": True},
    "class weights": {"class_weight": True},
    "smoothing": {"label_smoothing": 0.2},
    "ignored": {"ignore_index": 3},
    "everything": {"bias": True, "class_weight": True, "label_smoothing": 0.3, "ignore_index": 3},
}
SIZES = (1, 3, 4, 50)
"""Of slices, for 12 tokens."""


def plain(
    hidden, weight, target, *, bias=None, class_weight=None, reduction="mean", ignore_index=-100, label_smoothing=0.0
):
    logits = hidden @ weight.T if bias is None else hidden @ weight.T + bias
    losses = F.cross_entropy(
        logits.reshape(-1, CLASSES),
        target.flatten(),
        class_weight,
        reduction=reduction,
        ignore_index=ignore_index,
        label_smoothing=label_smoothing,
    )
    return losses.reshape(target.shape) if reduction == "none" else losses


def given(options, shape=(3, 4), dtype=F64):
    """The tensors to differentiate by, and the options; the target holds every class."""
    torch.manual_seed(0)
    hidden, weight = torch.randn(*shape, WIDTH), torch.randn(CLASSES, WIDTH)
    tensors = [t.to(dtype).requires_grad_() for t in (hidden, weight, torch.randn(CLASSES))]
    target = torch.arange(torch.Size(shape).numel()).remainder(CLASSES).reshape(shape)
    options = dict(options)
    if not options.pop("bias", False):
        tensors.pop()
    if options.get("class_weight"):
        options["class_weight"] = torch.rand(CLASSES, dtype=dtype)

    def call(function, *tensors, **more):
        return function(*tensors[:2], target, bias=tensors[2] if len(tensors) > 2 else None, **options, **more)

    return tensors, call


def drawn(tensor):
    """Numbers that do not depend on how the tensor lies in memory, as those of `randn_like` do."""
    return torch.randn(tensor.shape, dtype=tensor.dtype)


def derivatives(value, tensors, order=3):
    """The value, and that many orders of derivatives, each along directions of its own."""
    torch.manual_seed(1)
    found = [value]
    for left in range(order, 0, -1):
        grads = torch.autograd.grad(value, tensors, drawn(value), create_graph=left > 1)
        found += grads
        value = torch.stack([(g * drawn(g)).sum() for g in grads])
    return [t.detach() for t in found]


def agree(found, expected, tolerance=1e-12):
    assert len(found) == len(expected)
    assert all(f.shape == e.shape and f.dtype == e.dtype for f, e in zip(found, expected, strict=True))
    size = max(e.detach().norm() for e in expected)
    assert max((f - e).detach().norm() for f, e in zip(found, expected, strict=True)) <= tolerance * size


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("name", OPTIONS)
def test_values_and_three_orders_of_derivatives_are_those_of_torch(name, reduction, size):
    tensors, call = given(OPTIONS[name])
    expected = derivatives(call(plain, *tensors, reduction=reduction), tensors)
    ours = call(chunked_cross_entropy, *tensors, reduction=reduction, chunk_size=size)
    agree(derivatives(ours, tensors), expected)


@pytest.mark.parametrize("shape", [(), (1,), (130,), (2, 1, 3)])
def test_any_leading_shape(shape):
    tensors, call = given(OPTIONS["everything"], shape)
    expected = derivatives(call(plain, *tensors, reduction="none"), tensors)
    agree(derivatives(call(chunked_cross_entropy, *tensors, reduction="none"), tensors), expected)


@pytest.mark.parametrize("wanted", [(0,), (1,), (2,), (0, 2), (1, 2)])
def test_what_needs_no_gradient_gets_none(wanted):
    tensors, call = given(OPTIONS["everything"])
    own = [tensors[i] for i in wanted]
    for i, tensor in enumerate(tensors):
        tensor.requires_grad_(i in wanted)
    expected = derivatives(call(plain, *tensors), own)
    agree(derivatives(call(chunked_cross_entropy, *tensors, chunk_size=5), own), expected)


def test_a_tied_weight():
    torch.manual_seed(0)
    weight, tokens = torch.randn(CLASSES, WIDTH, dtype=F64, requires_grad=True), torch.arange(7).repeat(2)
    found, expected = (
        derivatives(function(weight[tokens[:-1]].tanh(), weight, tokens[1:]), [weight])
        for function in (partial(chunked_cross_entropy, chunk_size=4), plain)
    )
    agree(found, expected)


@pytest.mark.parametrize("tokens", [0, 3])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_no_token_at_all(tokens, reduction):
    """None, or none that is not ignored: a sum is 0, a mean is NaN, and gradients are 0."""
    torch.manual_seed(0)
    hidden, weight = (torch.randn(n, WIDTH, dtype=F64, requires_grad=True) for n in (tokens, CLASSES))
    found, expected = (
        function(hidden, weight, torch.full((tokens,), -100), reduction=reduction)
        for function in (chunked_cross_entropy, plain)
    )
    assert torch.equal(found.isnan(), expected.isnan()) and torch.equal(found.nan_to_num(), expected.nan_to_num())
    for grad in torch.autograd.grad(found.sum(), [hidden, weight]):
        assert not grad.any()


@pytest.mark.parametrize("name", OPTIONS)
def test_forward_over_reverse(name):
    tensors, call = given(OPTIONS[name])
    tangents = [torch.randn_like(t) for t in tensors]
    loss = partial(call, partial(chunked_cross_entropy, chunk_size=5))

    value = call(plain, *tensors)
    grads = torch.autograd.grad(value, tensors, create_graph=True)
    slope = sum((g * t).sum() for g, t in zip(grads, tangents, strict=True))
    expected = [value, *grads, slope, *torch.autograd.grad(slope, tensors)]

    both = torch.func.grad_and_value(loss, argnums=tuple(range(len(tensors))))
    primals = tuple(t.detach() for t in tensors)
    (grads, value), (products, slope) = torch.func.jvp(both, primals, tuple(tangents))
    agree([value, *grads, slope, *products], expected)

    with fwad.dual_level():
        duals = [fwad.make_dual(t, u) for t, u in zip(tensors, tangents, strict=True)]
        value, slope = fwad.unpack_dual(loss(*duals))
        pairs = [fwad.unpack_dual(g) for g in torch.autograd.grad(loss(*duals), duals)]
    agree([value, *(p for p, _ in pairs), slope, *(t for _, t in pairs)], expected)


@pytest.mark.parametrize("moving", [(0,), (1,), (2,)])
def test_forward_derivatives_along_some_of_the_arguments(moving):
    tensors, call = given(OPTIONS["everything"])
    loss = partial(call, partial(chunked_cross_entropy, chunk_size=5))
    tangents = [torch.randn_like(t) for t in tensors]
    grads = torch.autograd.grad(call(plain, *tensors), tensors, create_graph=True)
    expected = torch.autograd.grad(sum((grads[i] * tangents[i]).sum() for i in moving), tensors)
    with fwad.dual_level():
        mixed = [fwad.make_dual(t, u) if i in moving else t for i, (t, u) in enumerate(zip(tensors, tangents, strict=True))]
        found = [fwad.unpack_dual(g).tangent for g in torch.autograd.grad(loss(*mixed), mixed)]
    agree(found, expected)


@pytest.mark.parametrize("dims", [(0, 0, 0), (0, None, None), (1, None, 0), (0, 2, None), (None, 0, 0)])
def test_vectorised(dims):
    """Both derivatives outside `vmap`, as in an engine, and both inside of it."""
    torch.manual_seed(0)
    shapes = [(4, WIDTH), (CLASSES, WIDTH), (CLASSES,)]
    tensors = [
        torch.randn(*shape if dim is None else (*shape[:dim], 3, *shape[dim:]), dtype=F64, requires_grad=True)
        for shape, dim in zip(shapes, dims, strict=True)
    ]
    target = torch.randint(CLASSES, (3, 4))
    class_weight = torch.rand(CLASSES, dtype=F64)

    def one(function, hidden, weight, bias, target):
        return function(
            hidden, weight, target, bias=bias, class_weight=class_weight, label_smoothing=0.1, ignore_index=2
        )

    def losses(function, *tensors):
        rows = [[t if d is None else t.select(d, i) for t, d in zip(tensors, dims, strict=True)] for i in range(3)]
        return torch.stack([one(function, *row, target[i]) for i, row in enumerate(rows)])

    ours = partial(chunked_cross_entropy, chunk_size=3)
    vectorised = torch.func.vmap(partial(one, ours), in_dims=(*dims, 0))
    agree(derivatives(vectorised(*tensors, target), tensors), derivatives(losses(plain, *tensors), tensors))

    moving = tuple(range(3))
    values = [t.detach() for t in tensors]
    for way in (torch.func.grad, lambda f, argnums: torch.func.jacrev(torch.func.grad(f, argnums), argnums)):
        found, expected = (
            torch.func.vmap(way(partial(one, function), argnums=moving), in_dims=(*dims, 0))(*values, target)
            for function in (ours, plain)
        )
        agree(torch.utils._pytree.tree_leaves(found), torch.utils._pytree.tree_leaves(expected))


def test_vectorised_twice():
    torch.manual_seed(0)
    hidden, weight = (torch.randn(2, 3, n, WIDTH, dtype=F64, requires_grad=True) for n in (4, CLASSES))
    target = torch.randint(CLASSES, (2, 3, 4))
    twice = torch.func.vmap(torch.func.vmap(partial(chunked_cross_entropy, chunk_size=3)))
    expected = torch.stack(
        [torch.stack([plain(*row) for row in zip(*rows, strict=True)]) for rows in zip(hidden, weight, target, strict=True)]
    )
    agree(derivatives(twice(hidden, weight, target), [hidden, weight]), derivatives(expected, [hidden, weight]))
