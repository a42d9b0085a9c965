"""Attention in evaluations: fused where first derivatives are enough, and in slices where second ones are formed."""

import threading

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from imaml import MAML, GradientDescent, ImplicitMAML, Objective, TaskBatch
from imaml._objective import attention
from imaml._objective.attention import AnyAttention, MathAttention
from imaml.measure import peak_memory
from tests.oracles import relative_error

F64 = torch.float64
INNER = GradientDescent(lr=0.1, steps=2)


class Attends(nn.Module):
    """A query, key and value of its own for every head, and a call of torch's attention."""

    def __init__(self, attend, heads=2, key_heads=2):
        super().__init__()
        self.heads, self.key_heads, self.attend = heads, key_heads, attend
        self.q, self.k, self.v = nn.Linear(3, 4 * heads), nn.Linear(3, 4 * key_heads), nn.Linear(3, 4 * key_heads)
        self.leave = nn.Linear(4 * heads, 1)

    def forward(self, x):
        split = lambda t, heads: t.unflatten(-1, (heads, 4)).transpose(-2, -3)  # noqa: E731
        found = self.attend(
            split(self.q(x), self.heads), split(self.k(x), self.key_heads), split(self.v(x), self.key_heads)
        )
        return self.leave(found.transpose(-2, -3).flatten(-2)).mean(-2)


def by_hand(q, k, v, mask=None, causal=False, scale=None):
    """The textbook's formula."""
    scores = q @ k.transpose(-1, -2) * (q.shape[-1] ** -0.5 if scale is None else scale)
    if causal:
        scores = scores.masked_fill(~torch.ones(scores.shape[-2:], dtype=torch.bool).tril(), -torch.inf)
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask
    return scores.softmax(-1) @ v


SEEN = torch.rand(5, 5) > 0.3
SEEN.fill_diagonal_(True)
BIAS = torch.randn(6, 1, 5, 5, dtype=F64)
OF_HEADS = torch.randn(2, 5, 5, dtype=F64)
FORMS = {
    "plain": ({}, {}),
    "causal": ({"is_causal": True}, {"causal": True}),
    "scaled": ({"scale": 0.3}, {"scale": 0.3}),
    "which are seen": ({"attn_mask": SEEN}, {"mask": SEEN}),
    "a bias of examples": ({"attn_mask": BIAS}, {"mask": BIAS}),
    "a bias of heads": ({"attn_mask": OF_HEADS}, {"mask": OF_HEADS}),
}


def batch(tasks=2, examples=6):
    torch.manual_seed(1)
    x, y = torch.randn(2, tasks, examples, 5, 3, dtype=F64), torch.randn(2, tasks, examples, 1, dtype=F64)
    return TaskBatch(support=(x[0], y[0]), query=(x[1], y[1]))


def found(engine, attend, **options):
    torch.manual_seed(0)
    model = Attends(attend, **{k: options.pop(k) for k in ("heads", "key_heads") if k in options}).double()
    return engine.value_and_grad(Objective(model, F.mse_loss, **options), batch())[1]


def agree(one, other):
    assert max(relative_error({n: one[n]}, {n: other[n]}) for n in one if other[n].norm() > 1e-9) < 1e-12


@pytest.mark.parametrize("few", [5 * 5, 3 * 25, 4 * 25, 2**20])
@pytest.mark.parametrize("form", FORMS)
def test_slices_have_the_derivatives_of_the_whole(monkeypatch, form, few):
    monkeypatch.setattr(attention, "FEW", few)
    monkeypatch.setattr(attention, "MANY", few)
    torchs, mine = FORMS[form]
    for engine in (
        MAML(inner=INNER, linearize=False),
        MAML(inner=INNER, chunk_size=1, linearize=False),
        MAML(inner=INNER, chunk_size=1, hvp="forward-over-reverse"),
    ):
        expected = found(engine, lambda q, k, v: by_hand(q, k, v, **mine))
        agree(found(engine, lambda q, k, v: F.scaled_dot_product_attention(q, k, v, **torchs)), expected)


def test_grouped_heads_and_attention_of_heads_in_a_block(monkeypatch):
    monkeypatch.setattr(attention, "FEW", 25)
    monkeypatch.setattr(attention, "MANY", 25)
    engine = MAML(inner=INNER, chunk_size=1, linearize=False)

    def grouped(q, k, v):
        return F.scaled_dot_product_attention(q, k, v, enable_gqa=True)

    def repeated(q, k, v):
        return by_hand(q, k.repeat_interleave(2, -3), v.repeat_interleave(2, -3))

    expected = found(engine, repeated, heads=4)
    agree(found(engine, grouped, heads=4), expected)

    def inside(**options):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(3, 3), Attends(F.scaled_dot_product_attention)).double()
        return engine.value_and_grad(Objective(model, F.mse_loss, **options), batch())[1]

    agree(inside(recompute=["1"]), inside())


@pytest.mark.parametrize("hvp", ["reverse-over-reverse", "forward-over-reverse"])
def test_a_product_holds_the_scores_of_a_slice(monkeypatch, hvp):
    """Of a long sequence; a second derivative of all of it holds some ten matrices of scores."""
    torch.manual_seed(0)
    x, y = torch.randn(1, 4, 256, 3), torch.randn(1, 4, 1)
    tasks = TaskBatch(support=(x, y), query=(x, y))
    objective = Objective(Attends(F.scaled_dot_product_attention), F.mse_loss)
    engine = MAML(inner=GradientDescent(lr=0.1, steps=1), linearize=False, hvp=hvp)

    def peak(many):
        monkeypatch.setattr(attention, "MANY", many)
        engine.value_and_grad(objective, tasks)
        return peak_memory(lambda: engine.value_and_grad(objective, tasks))

    assert peak(2**16) < 0.4 * peak(2**40)


def test_first_derivatives_in_a_recomputed_block_are_by_the_fused_kernel(monkeypatch):
    """In a product too: what is differentiated again comes later, and is computed anew."""
    seen = []
    plain = attention.plain

    def spy(*args, **kwargs):
        seen.append((torch.is_grad_enabled(), torch.backends.cuda.flash_sdp_enabled()))
        return plain(*args, **kwargs)

    monkeypatch.setattr(attention, "plain", spy)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 3), Attends(F.scaled_dot_product_attention)).double()
    engine = ImplicitMAML(inner=INNER, linearize=True, chunk_size=1, on_failure="ignore", hvp="reverse-over-reverse")
    engine.value_and_grad(Objective(model, F.mse_loss, recompute=["1"]), batch(1))
    assert {fused for _, fused in seen} == {True, False}
    fused = sum(fused for _, fused in seen)
    assert fused >= 2 * INNER.steps + 2  # a gradient evaluates the block twice


@pytest.mark.parametrize("chunk_size", [None, 1])
def test_dropout_of_attention_is_the_same_in_gradient_and_product(monkeypatch, chunk_size):
    monkeypatch.setattr(attention, "MANY", 25)
    monkeypatch.setattr(attention, "FEW", 25)
    engines = [
        MAML(inner=INNER, chunk_size=chunk_size, hvp=hvp)
        for hvp in ("reverse-over-reverse", "forward-over-reverse", "finite-difference")
    ]
    results = []
    for engine in engines:
        torch.manual_seed(3)
        state = torch.get_rng_state()

        def attend(q, k, v):
            return F.scaled_dot_product_attention(q, k, v, dropout_p=0.3)

        torch.manual_seed(0)
        objective = Objective(Attends(attend).double(), F.mse_loss)
        torch.set_rng_state(state)
        results.append(engine.value_and_grad(objective, batch())[1])
    agree(results[1], results[0])
    assert relative_error(results[2], results[0]) < 1e-6


def test_other_threads_and_what_comes_after_have_the_kernels_of_the_user():
    before = torch.backends.cuda.flash_sdp_enabled(), torch.backends.cuda.math_sdp_enabled()
    inside, other, done = threading.Event(), [], threading.Event()

    def wants_mathematics():
        with MathAttention():
            inside.set()
            done.wait(10)

    thread = threading.Thread(target=wants_mathematics)
    thread.start()
    inside.wait(10)
    with MathAttention(), AnyAttention():  # but the other thread still wants it
        other.append(torch.backends.cuda.flash_sdp_enabled())
    done.set()
    thread.join()
    assert other == [False]
    with MathAttention():
        with MathAttention(), AnyAttention():
            assert torch.backends.cuda.flash_sdp_enabled() == before[0]
        assert not torch.backends.cuda.flash_sdp_enabled()
    assert (torch.backends.cuda.flash_sdp_enabled(), torch.backends.cuda.math_sdp_enabled()) == before
    assert F.scaled_dot_product_attention is attention.plain


def test_attention_outside_an_evaluation_is_torchs_own():
    """Though the name leads elsewhere while another thread evaluates."""
    calls = []

    def loss(params, batch):
        thread = threading.Thread(
            target=lambda: calls.append(F.scaled_dot_product_attention(*torch.ones(3, 2, 4, 4)).shape)
        )
        thread.start()
        thread.join()
        return (params["w"] * batch).square().mean()

    x = torch.ones(1, 3)
    MAML(inner=INNER).value_and_grad(Objective.from_function(loss, {"w": torch.ones(3)}), TaskBatch(support=x, query=x))
    assert calls and set(calls) == {torch.Size([2, 4, 4])}
