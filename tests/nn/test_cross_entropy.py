"""`imaml.nn.chunked_cross_entropy` against torch's own cross entropy on all logits at once."""

from functools import partial

import pytest
import torch
import torch.autograd.forward_ad as fwad
import torch.nn.functional as F
from torch import nn
from torch.fx.experimental.proxy_tensor import make_fx

import imaml
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
        logits.flatten(0, -2) if logits.ndim > 1 else logits.unsqueeze(0),
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
        options["class_weight"] = torch.arange(1, CLASSES + 1, dtype=dtype) / 8  # which every dtype holds

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


def test_a_fourth_order():
    tensors, call = given(OPTIONS["everything"])
    expected = derivatives(call(plain, *tensors), tensors, order=4)
    agree(derivatives(call(chunked_cross_entropy, *tensors, chunk_size=5), tensors, order=4), expected)


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

    def squared(function, *tensors):  # so that the cotangent has a derivative
        return call(function, *tensors).square()

    loss = partial(squared, partial(chunked_cross_entropy, chunk_size=5))
    value = squared(plain, *tensors)
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
        mixed = [
            fwad.make_dual(t, u) if i in moving else t for i, (t, u) in enumerate(zip(tensors, tangents, strict=True))
        ]
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


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_class_weights_of_each_task(smoothing):
    torch.manual_seed(0)
    hidden = torch.randn(3, 4, WIDTH, dtype=F64, requires_grad=True)
    weight = torch.randn(CLASSES, WIDTH, dtype=F64, requires_grad=True)
    target, class_weight = torch.randint(CLASSES, (3, 4)), torch.rand(3, CLASSES, dtype=F64)

    def one(function, hidden, target, class_weight):
        return function(hidden, weight, target, class_weight=class_weight, label_smoothing=smoothing)

    found = torch.func.vmap(partial(one, partial(chunked_cross_entropy, chunk_size=3)))(hidden, target, class_weight)
    expected = torch.stack([one(plain, *row) for row in zip(hidden, target, class_weight, strict=True)])
    agree(derivatives(found, [hidden, weight]), derivatives(expected, [hidden, weight]))


def test_a_class_that_a_bias_forbids():
    tensors, call = given(OPTIONS["bias"], (2,))  # targets 0 and 1
    with torch.no_grad():
        tensors[2][3] = -float("inf")
    by = tensors[:2]
    expected = derivatives(call(plain, *tensors), by)
    agree(derivatives(call(chunked_cross_entropy, *tensors, chunk_size=1), by), expected)


def test_vectorised_twice():
    torch.manual_seed(0)
    hidden, weight = (torch.randn(2, 3, n, WIDTH, dtype=F64, requires_grad=True) for n in (4, CLASSES))
    target = torch.randint(CLASSES, (2, 3, 4))
    twice = torch.func.vmap(torch.func.vmap(partial(chunked_cross_entropy, chunk_size=3)))
    expected = torch.stack(
        [
            torch.stack([plain(*row) for row in zip(*rows, strict=True)])
            for rows in zip(hidden, weight, target, strict=True)
        ]
    )
    agree(derivatives(twice(hidden, weight, target), [hidden, weight]), derivatives(expected, [hidden, weight]))


INNER = GradientDescent(lr=0.3, steps=3)
ENGINES = {
    "MAML": MAML(inner=INNER),
    "MAML, one by one": MAML(inner=INNER, chunk_size=1),
    "MAML, graphs kept": MAML(inner=INNER, linearize=True),
    "MAML, graphs rebuilt": MAML(inner=INNER, linearize=False),
    "MAML, forward-over-reverse": MAML(inner=INNER, hvp="forward-over-reverse"),
    "MAML, slices": MAML(inner=INNER, microbatch_size=2),
    "MAML, Adam": MAML(inner=Adam(lr=0.01, steps=3)),
    "FOMAML": FOMAML(inner=INNER),
    "ImplicitMAML": ImplicitMAML(inner=INNER, solver=CG(max_steps=3), on_failure="ignore"),
    "ImplicitMAML, rebuilt": ImplicitMAML(inner=INNER, solver=CG(max_steps=3), on_failure="ignore", linearize=False),
}


class Language(nn.Module):
    """Predicts the next token; returns hidden states and the head's weight, which is the embedding if it is tied."""

    def __init__(self, tied):
        super().__init__()
        self.embedding, self.hidden = nn.Embedding(CLASSES, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.head = nn.Linear(WIDTH, CLASSES, bias=not tied)
        if tied:
            self.head.weight = self.embedding.weight

    def forward(self, tokens):
        return self.hidden(self.embedding(tokens)).tanh(), self.head.weight, self.head.bias


def loss_of(function, **options):
    def loss(output, target):
        hidden, weight, bias = output
        return function(hidden, weight, target, bias=bias, label_smoothing=0.1, **options)

    return loss


def language(tied, dtype=F64):
    torch.manual_seed(0)
    tokens = torch.randint(CLASSES, (2, 3, 4, 6))
    support, query = ((t[..., :-1], t[..., 1:]) for t in tokens)
    return Language(tied).to(dtype), TaskBatch(support=support, query=query)


def meta_gradients(engine, tied, adapt=None, **options):
    model, tasks = language(tied)
    for function, more in ((chunked_cross_entropy, options), (plain, {})):
        found = engine.value_and_grad(Objective(model, loss_of(function, **more), adapt=adapt), tasks)
        yield [found[0], *found[1].values()]


@pytest.mark.parametrize("adapt", [None, ["hidden"], ["head"]])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("name", ENGINES)
def test_meta_gradients_are_those_of_all_logits_at_once(name, tied, adapt):
    agree(*meta_gradients(ENGINES[name], tied, ["embedding"] if tied and adapt == ["head"] else adapt, chunk_size=7))


@pytest.mark.parametrize("name", ["MAML", "MAML, one by one", "ImplicitMAML"])
def test_in_a_block_that_is_recomputed_itself(name):
    model, tasks = language(tied=True)
    found, expected = (
        ENGINES[name].value_and_grad(Objective(model, loss_of(function)), tasks)
        for function in (partial(imaml.recompute, chunked_cross_entropy), plain)
    )
    agree([found[0], *found[1].values()], [expected[0], *expected[1].values()])


HALF = [torch.float16, torch.bfloat16]


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("name", ["plain", "everything"])
def test_half_precision_is_as_exact_as_its_logits(name, dtype):
    """Of the numbers that half precision holds, against float64: sums over many tokens lose nothing."""
    tensors, call = given(OPTIONS[name], (2000,), dtype)
    exact = [t.detach().double().requires_grad_() for t in tensors]
    _, call_exact = given(OPTIONS[name], (2000,))
    loss = call(chunked_cross_entropy, *tensors, chunk_size=1)
    assert loss.dtype == torch.float32
    found = torch.autograd.grad(loss, tensors)
    assert all(g.dtype == dtype for g in found)
    expected = torch.autograd.grad(call_exact(plain, *exact), exact)
    for g, e in zip(found[1:], expected[1:], strict=True):
        assert (g.double() - e).norm() <= torch.finfo(dtype).eps * e.norm()


@pytest.mark.parametrize("backward_inside", [False, True])
def test_autocast_casts_what_a_matrix_product_casts(backward_inside):
    tensors, call = given(OPTIONS["everything"], (60,), torch.float32)
    found = []
    for function in (partial(chunked_cross_entropy, chunk_size=16), plain):
        with torch.autocast("cpu", torch.bfloat16):
            loss = call(function, *tensors)
            inside = torch.autograd.grad(loss, tensors, create_graph=True)
        grads = inside if backward_inside else torch.autograd.grad(loss, tensors, create_graph=True)
        products = torch.autograd.grad(sum(g.square().sum() for g in grads), tensors)
        found.append([t.detach() for t in (loss, *grads, *products)])
    agree(*found, tolerance=2e-2)  # bfloat16 rounds to 4e-3
    assert not torch.equal(found[0][0], call(plain, *tensors).detach())
    exact, call = given(OPTIONS["everything"])  # autocast leaves float64 alone
    with torch.autocast("cpu", torch.bfloat16):
        agree([call(chunked_cross_entropy, *exact)], [call(plain, *exact)])


def test_a_trace_has_the_same_derivatives():
    tensors, call = given(OPTIONS["everything"])

    def twice(*tensors):
        grads = torch.autograd.grad(
            call(partial(chunked_cross_entropy, chunk_size=5), *tensors), tensors, create_graph=True
        )
        return torch.autograd.grad(sum(g.square().sum() for g in grads), tensors)

    found = make_fx(twice)(*tensors)(*tensors)
    agree(found, twice(*tensors))


def test_autocast_around_a_backward_pass_changes_nothing():
    tensors, call = given(OPTIONS["everything"], dtype=torch.float32)
    loss = call(chunked_cross_entropy, *tensors)
    with torch.autocast("cpu", torch.bfloat16):
        found = torch.autograd.grad(loss, tensors, retain_graph=True)
    agree(found, torch.autograd.grad(loss, tensors), 1e-6)


def large():
    """A loss whose weight is large beside its other tensors, and its logits larger than that."""
    torch.manual_seed(0)
    hidden, weight = (torch.randn(n, 256, requires_grad=True) for n in (512, 1000))
    target = torch.randint(1000, (512,))
    return hidden, weight, lambda function, *tensors: function(*(tensors or (hidden, weight)), target)


SLICE = 16
SMALL = partial(chunked_cross_entropy, chunk_size=SLICE)


def test_no_more_is_held_than_the_gradients_and_a_slice():
    hidden, weight, call = large()
    along = torch.randn_like(weight)
    grads = torch.autograd.grad(call(SMALL), (hidden, weight), create_graph=True)
    # Slices of the gradient by the hidden states are put together, which takes them twice.
    floor, logits = (2 * hidden.numel() + weight.numel()) * 4, SLICE * weight.shape[0] * 4

    def gradient(function=SMALL, by=(hidden, weight)):
        return torch.autograd.grad(call(function), by)

    product = partial(torch.autograd.grad, grads[1], (hidden, weight), along, retain_graph=True)
    assert peak_memory(gradient) < floor + 2.5 * logits
    assert peak_memory(product) < floor + 4.5 * logits
    assert peak_memory(partial(gradient, plain)) > 1.2 * floor + 2.5 * logits
    weight.requires_grad_(False)
    assert peak_memory(partial(gradient, by=(hidden,))) < 2 * hidden.numel() * 4 + 2.5 * logits


def test_tasks_that_share_a_head_hold_one_gradient_of_it():
    hidden, weight, call = large()
    tasks = torch.stack([hidden.detach()] * 4)

    def gradient():
        losses = torch.func.vmap(partial(call, SMALL), in_dims=(0, None))(tasks, weight)
        return torch.autograd.grad(losses.sum(), weight)

    assert peak_memory(gradient) < 2 * weight.numel() * 4


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"hidden": torch.zeros(2, 4)}, ValueError, r"\(2, 4\) and \(7, 5\): is the weight transposed"),
        ({"weight": torch.zeros(5)}, ValueError, r"`weight` of shape \(classes, d\)"),
        ({"weight": [[1.0] * 5]}, TypeError, "`weight` must be a tensor. Got list"),
        ({"target": torch.zeros(3, dtype=torch.int64)}, ValueError, r"shape \(2,\). Got \(3,\)"),
        ({"target": torch.zeros(2, 7)}, ValueError, "probabilities are not supported"),
        ({"target": torch.zeros(2)}, TypeError, "class indices, such as torch.int64. Got torch.float32"),
        ({"target": torch.tensor([0, 7])}, IndexError, "from 0 to 6, or `ignore_index`. Got 7"),
        ({"target": torch.tensor([-1, 0])}, IndexError, "Got -1"),
        ({"hidden": torch.zeros(2, 5, dtype=F64)}, TypeError, "one real floating-point dtype.*float32, torch.float64"),
        ({"hidden": torch.zeros(2, 5).long(), "weight": torch.zeros(7, 5).long()}, TypeError, "Got torch.int64"),
        ({"bias": torch.zeros(5)}, ValueError, r"`bias` must have one entry for each class, shape \(7,\). Got \(5,\)"),
        ({"class_weight": torch.ones(8)}, ValueError, "`class_weight` must have one entry"),
        ({"class_weight": torch.ones(7, requires_grad=True)}, ValueError, "requires grad, and gets no gradient"),
        ({"reduction": "avg"}, ValueError, "Got 'avg'"),
        ({"label_smoothing": 1.5}, ValueError, "from 0 to 1. Got 1.5"),
        ({"chunk_size": 0}, ValueError, "at least 1, a number of tokens. Got 0"),
    ],
)
def test_bad_input(change, error, words):
    given = {"hidden": torch.zeros(2, 5), "weight": torch.zeros(7, 5), "target": torch.tensor([0, 1])}
    with pytest.raises(error, match=words):
        chunked_cross_entropy(**given | change)


def test_a_target_that_is_no_class_is_found_among_vectorised_tasks():
    hidden, weight, target = torch.zeros(3, 2, 5), torch.zeros(7, 5), torch.tensor([[0, 1], [2, 9], [3, 4]])
    with pytest.raises(IndexError, match="Got 9"):
        torch.func.vmap(chunked_cross_entropy, in_dims=(0, None, 0))(hidden, weight, target)


def test_class_weights_that_require_grad_are_refused_among_vectorised_tasks_too():
    hidden, weight, target = torch.zeros(3, 2, 5), torch.zeros(7, 5), torch.tensor([[0, 1], [2, 5], [3, 4]])
    class_weight = torch.ones(3, 7, requires_grad=True)
    with pytest.raises(ValueError, match="requires grad"):
        torch.func.vmap(lambda h, t, c: chunked_cross_entropy(h, weight, t, class_weight=c))(
            hidden, target, class_weight
        )


def test_targets_may_be_any_integers():
    hidden, weight = torch.randn(2, 5), torch.randn(7, 5)
    target = torch.tensor([3, 1])
    assert torch.equal(*(chunked_cross_entropy(hidden, weight, t) for t in (target, target.to(torch.int32))))
