"""The scripts of the numbers on recomputation run, and their derivatives are right where a model is not torch's own."""

import sys
from dataclasses import replace

import pytest
import torch
from torch import nn

from benchmarks import language_model, loop, products, recompute
from benchmarks.ratios import Cost
from imaml import MAML, Objective


@pytest.fixture(autouse=True)
def _quiet(monkeypatch):
    monkeypatch.setenv("KINETO_LOG_LEVEL", "99")
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("script", [loop, products, recompute], ids=lambda script: script.__name__)
def test_a_script_prints_a_row_for_every_setting(script, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [script.__name__, "--small"])
    script.main()
    rows = [line.split(" | ") for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    assert len(rows) >= 4 and len({len(row) for row in rows}) == 1


def test_a_row_is_in_gradients():
    assert Cost(bytes=3_000_000, seconds=1.0).row("name", Cost(bytes=2_000_000, seconds=0.5)) == (
        "| name | 1.50 | 2.0 | 3 |"
    )


def test_the_loop_is_continued_along_a_line(monkeypatch):
    monkeypatch.setattr(loop.Cost, "of", lambda call, repeats: Cost(bytes=10 + 3 * call, seconds=1.0 + call))
    monkeypatch.setitem(loop.METHODS, "create_graph loop", type("Steps", (), {"prepare": lambda p: p.steps}))
    problem = loop.WORKLOADS["small"].problem(8)
    assert loop.loop(replace(loop.SMALL, steps=20), problem) == Cost(bytes=70, seconds=21.0)


def small_llama():
    """Of the architecture of SmolLM2, in float64; HuggingFace's own normalisation computes in float32."""
    pytest.importorskip("transformers", reason="the extra imaml[text] is not installed")
    torch.manual_seed(0)
    model = language_model.random(2, **language_model.SMALL).double()
    for module in list(model.modules()):
        for name, norm in list(module.named_children()):
            if type(norm).__name__ == "LlamaRMSNorm":
                own = nn.RMSNorm(norm.weight.shape, eps=norm.variance_epsilon, dtype=torch.float64)
                setattr(module, name, own)
    for parameter in model.parameters():
        parameter.data.add_(0.1 * torch.randn_like(parameter))
    return model


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated:FutureWarning")
@pytest.mark.parametrize("options", [{}, {"storage": "disk", "microbatch_size": 1}], ids=["whole", "in slices"])
def test_a_checkpointed_decoder_with_tied_embeddings_has_the_meta_gradient_of_the_loop(options):
    llama = small_llama()
    assert llama.lm_head.weight is llama.model.embed_tokens.weight
    tokens = language_model.random_tokens(llama, examples=3, length=9)
    inner = replace(language_model.INNER, lr=0.01, steps=2)
    expected = language_model.unrolled(language_model.LanguageModel(llama, recomputes=False), tokens, inner)

    model = language_model.LanguageModel(llama)
    engine = MAML(inner=inner, chunk_size=1, **options)
    objective, tasks = Objective(model, language_model.itself), language_model.tasks_of(tokens)
    _, found = engine.value_and_grad(objective, tasks)
    (name,) = engine(objective, tasks).report.recomputed
    assert "LlamaDecoderLayer" in name
    assert found.keys() == dict(model.named_parameters()).keys()
    for gradient, exact in zip(found.values(), expected, strict=True):
        assert (gradient - exact).norm() <= 1e-10 * exact.norm()


def test_what_grows_linearly_in_several_quantities_is_continued_exactly(monkeypatch):
    """Of layers, steps and examples: 5 + 2 L K n + 3 K."""

    def peak(call):
        model, tokens, inner = call.__defaults__
        return 5 + 2 * len(model.model.model.layers) * inner.steps * tokens.shape[2] + 3 * inner.steps

    monkeypatch.setattr(language_model, "peak_memory", peak)
    pytest.importorskip("transformers", reason="the extra imaml[text] is not installed")
    many = {"layers": 30, "steps": 4, "examples": 8}
    found = language_model.peak_of_the_loop(8, language_model.FEW, many, **language_model.SMALL)
    assert found == pytest.approx(5 + 2 * 30 * 4 * 8 + 3 * 4)


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated:FutureWarning")
def test_the_language_model_prints_its_peak_beside_the_loops(monkeypatch, capsys):
    pytest.importorskip("transformers", reason="the extra imaml[text] is not installed")
    monkeypatch.setattr(sys, "argv", ["language_model", "--small", "--examples", "2"])
    language_model.main()
    printed = capsys.readouterr().out
    assert "by the allocator:" in printed and "the unrolled loop:" in printed and "recomputed:" in printed
