"""Operations of all tasks at once: values and derivatives are those of one task after another."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from imaml import MAML, GradientDescent, Objective, Task, TaskBatch
from imaml._objective import at_once
from imaml._objective.exact import ExactDerivatives
from imaml._torch import is_functorch_wrapped_tensor, vectorised

TASKS = 3


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def drawn(*shape):
    return torch.randn(TASKS, *shape, dtype=torch.float64).requires_grad_()


def at_once_of(function, tensors):
    """Under the library's own vmap, where the operations are replaced."""
    with ExactDerivatives():
        return vectorised(lambda rows: [function(*rows)], tensors, TASKS)[0]


def one_by_one(function, tensors):
    return torch.stack([function(*rows) for rows in zip(*tensors, strict=True)])


def orders(evaluate, function, tensors, count):
    """The value, and derivatives of that many orders along fixed random directions."""
    generator = torch.Generator().manual_seed(1)

    def weights(like):
        return torch.randn(like.shape, dtype=like.dtype, generator=generator)

    found = [evaluate(function, tensors)]
    current = (found[0] * weights(found[0])).sum()
    for order in range(count):
        last = order == count - 1
        grads = torch.autograd.grad(current, tensors, create_graph=not last, materialize_grads=True)
        found += grads
        # not linear, so that the next order depends on all
        current = sum((g * weights(g)).sum() + (g * g).sum() / 2 for g in grads)
    return found


def agree(function, tensors, count=3, plain=None):
    ours, plain = orders(at_once_of, function, tensors, count), orders(one_by_one, plain or function, tensors, count)
    for a, b in zip(ours, plain, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12 * max(1.0, b.abs().max().item()))


@pytest.fixture
def ours(monkeypatch):
    """Notes how often an operation of the library's own was used, and not torch's."""
    calls = []

    def noting(name):
        whole = getattr(at_once, name)
        return lambda *args, **kwargs: calls.append(name) or whole(*args, **kwargs)

    for name in ("_linear", "convolution_of", "batch_norm_of"):
        monkeypatch.setattr(at_once, name, noting(name))
    return calls


@pytest.mark.parametrize("shape", [(4,), (5, 4), (2, 5, 4)])
@pytest.mark.parametrize("bias", [True, False])
def test_a_linear_layer(ours, shape, bias):
    tensors = [drawn(*shape), drawn(3, 4)] + [drawn(3)] * bias
    agree(lambda *own: torch.tanh(F.linear(*own)), tensors)
    assert ours


CONVOLUTIONS = {
    "strided, large images": ((4, 2, 9, 8), (3, 2, 3, 3), {"stride": 2, "padding": 1}),
    "small images": ((2, 3, 3, 3), (4, 3, 3, 3), {"padding": 1}),
    "one channel": ((4, 1, 8, 8), (3, 1, 3, 3), {"stride": (2, 1)}),
    "groups": ((2, 4, 6, 6), (6, 2, 3, 2), {"groups": 2, "padding": (1, 0)}),
    "dilated": ((2, 2, 7, 7), (3, 2, 3, 3), {"dilation": 2}),
}


@pytest.mark.parametrize("case", CONVOLUTIONS)
@pytest.mark.parametrize("bias", [True, False])
def test_a_convolution(ours, case, bias):
    images, weight, how = CONVOLUTIONS[case]
    tensors = [drawn(*images), drawn(*weight)] + [drawn(weight[0])] * bias
    agree(lambda *own: torch.tanh(F.conv2d(*own, **how)), tensors)
    assert ours


def normalised(x, gamma, beta, eps):
    """Batch normalisation in plain operations: torch's own has a wrong third derivative."""
    centred = x - x.mean((0, 2, 3), keepdim=True)
    z = centred * (centred.square().mean((0, 2, 3), keepdim=True) + eps).rsqrt()
    return gamma.view(-1, 1, 1) * z + beta.view(-1, 1, 1)


@pytest.mark.parametrize("after", ["convolution", "nothing"])
def test_batch_normalisation(ours, after):
    def function(norm):
        def apply(x, gamma, beta, weight):
            return torch.tanh(norm(F.conv2d(x, weight, None, 2, 1) if after == "convolution" else x, gamma, beta))

        return apply

    tensors = [drawn(4, 2, 6, 5), drawn(2), drawn(2), drawn(2, 2, 3, 3)]
    agree(
        function(lambda x, gamma, beta: F.batch_norm(x, None, None, gamma, beta, True, 0.1, 1e-3)),
        tensors,
        plain=function(lambda x, gamma, beta: normalised(x, gamma, beta, 1e-3)),
    )
    assert "batch_norm_of" in ours


FALLBACKS = {
    "a weight that all tasks share": lambda x: F.linear(x.sin(), torch.ones(3, 4, dtype=x.dtype)),
    "a string for padding": lambda x: F.conv2d(x[None, None], x[None, None, :3, :3], padding="same"),
    "an image alone": lambda x: F.conv2d(x[None], x[None, None, :2, :3]),
    "a task within a task": lambda x: torch.func.vmap(lambda row: F.linear(row, x))(x),
    "a derivative inside": lambda x: torch.func.grad(lambda y: F.linear(y, x).tanh().sum())(x),
    "normalisation without a weight": lambda x: F.batch_norm(x[None, None].sin(), None, None, training=True),
}


@pytest.mark.parametrize("case", FALLBACKS)
def test_what_is_not_known_is_torchs(ours, case):
    agree(FALLBACKS[case], [drawn(5, 4)], count=2)


def test_a_channel_of_one_entry_is_refused_as_by_torch():
    one, gamma = torch.randn(TASKS, 1, 2, 1, 1), torch.ones(TASKS, 2)
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        at_once_of(lambda x, g: F.batch_norm(x, None, None, g, g, True), [one, gamma])


def test_an_operation_that_fails_leaves_the_tasks_as_they_were():
    with pytest.raises(RuntimeError):
        at_once_of(F.linear, [torch.randn(TASKS, 5, 4), torch.randn(TASKS, 3, 7)])
    assert at_once_of(torch.sin, [torch.ones(TASKS, 2)]).shape == (TASKS, 2)


@pytest.mark.parametrize("hvp", ["reverse-over-reverse", "forward-over-reverse"])
def test_a_meta_gradient_is_that_of_one_task_at_a_time(hvp):
    def block(fan_in):
        return nn.Sequential(nn.Conv2d(fan_in, 4, 3, 2, 1), nn.BatchNorm2d(4, track_running_stats=False), nn.Softplus())

    model = nn.Sequential(block(1), block(4), nn.Flatten(), nn.Linear(16, 3)).double()
    images = torch.randn(TASKS, 2, 4, 1, 8, 8, dtype=torch.float64)
    labels = torch.randint(3, (TASKS, 2, 4))
    tasks = [Task(support=(x[0], y[0]), query=(x[1], y[1])) for x, y in zip(images, labels, strict=True)]
    inner = GradientDescent(lr=0.1, steps=2)
    found = [
        MAML(inner=inner, chunk_size=size, hvp=hvp).value_and_grad(Objective(model, F.cross_entropy), tasks)[1]
        for size in (TASKS, 1)
    ]
    for name, gradient in found[1].items():
        torch.testing.assert_close(found[0][name], gradient, rtol=1e-11, atol=1e-11)


class _Viewed(nn.Module):
    def forward(self, x):
        return x.view(x.shape[0], -1)


@pytest.mark.parametrize("after", [nn.GroupNorm(4, 16), _Viewed()], ids=["group norm", "view"])
def test_what_follows_large_images_is_vectorised(after):
    """Their channels lie last, of which `vmap` has no group norm, and no view flattens them."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 16, 3), after, nn.Flatten(), nn.Linear(16 * 14 * 14, 3)).double()
    x, y = torch.randn(2, 4, 6, 1, 16, 16).double(), torch.randint(3, (2, 4, 6))
    tasks = TaskBatch(support=(x[0], y[0]), query=(x[1], y[1]))
    engine, shapes = MAML(inner=GradientDescent(lr=0.01, steps=1), chunk_size=4), set()
    hook = model[0].register_forward_hook(lambda module, args, output: shapes.add(is_functorch_wrapped_tensor(output)))
    found = engine.value_and_grad(Objective(model, F.cross_entropy), tasks)[1]
    hook.remove()
    assert shapes == {True}
    expected = replace(engine, chunk_size=1).value_and_grad(Objective(model, F.cross_entropy), tasks)[1]
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-9, atol=1e-12)
