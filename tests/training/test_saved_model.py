import json
import re
import sys

import pytest
import torch
from torch import nn

from imaml.models import MLP, Conv4
from imaml.training import CheckpointError, load_model, save_model

safetensors = pytest.importorskip("safetensors.torch", reason="the extra imaml[train] is not installed")


@pytest.mark.parametrize(
    ("make", "x"),
    [
        (MLP, torch.randn(4, 1)),
        (lambda: MLP(in_features=3, out_features=2, hidden=(5,)), torch.randn(4, 3)),
        (lambda: MLP(hidden=()).double(), torch.randn(4, 1).double()),
        (lambda: Conv4(5, channels=4), torch.rand(4, 1, 28, 28)),
        (lambda: Conv4(3, channels=2, in_channels=3, image_size=84), torch.rand(4, 3, 84, 84)),
    ],
)
def test_a_model_comes_back_whole(tmp_path, make, x):
    torch.manual_seed(3)
    model = make()
    assert save_model(tmp_path, model) == tmp_path / "model.safetensors"
    for place in (tmp_path, str(tmp_path / "model.safetensors")):
        found = load_model(place)
        assert type(found) is type(model) and not found.training
        assert [name for name, _ in found.named_parameters()] == [name for name, _ in model.named_parameters()]
        pairs = zip(found.parameters(), model.parameters(), strict=True)
        assert all(p.requires_grad and torch.equal(p, q) for p, q in pairs)
        with torch.no_grad():
            torch.testing.assert_close(found(x), model.eval()(x))


def test_the_same_model_is_the_same_file(tmp_path):
    """In every process, whose hashes differ."""
    model = MLP()
    files = {save_model(tmp_path, model).read_bytes() for _ in range(20)}
    assert len(files) == 1


def test_any_reader_of_safetensors_finds_the_tensors(tmp_path):
    model = MLP()
    save_model(tmp_path, model)
    found = safetensors.load_file(tmp_path / "model.safetensors")
    assert found.keys() == model.state_dict().keys() and torch.equal(found["0.weight"], model[0].weight)


@pytest.mark.parametrize("model", [nn.Linear(2, 2), MLP(activation=nn.Tanh)])
def test_another_model_is_refused_with_what_to_do(tmp_path, model):
    with pytest.raises(TypeError, match=r"Got (Linear|MLP): save it by safetensors\.torch\.save_model"):
        save_model(tmp_path, model)
    assert not [*tmp_path.iterdir()]


def test_what_is_no_model_says_so(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no model .*model\.safetensors\. `imaml train` writes it"):
        load_model(tmp_path)
    save_model(tmp_path, MLP())
    path = tmp_path / "model.safetensors"
    whole = path.read_bytes()
    for damaged in (b"", whole[:50], whole[:-1]):
        path.write_bytes(damaged)
        with pytest.raises(CheckpointError, match="truncated, damaged or no model"):
            load_model(tmp_path)
    for metadata, message in [
        (None, "no model of the program. Expected one of mlp, conv4, minilm. Got {}"),
        ({"imaml": json.dumps(["evil:make", {}])}, "Got evil:make"),
        ({"imaml": "mlp"}, "no model of the program"),
        ({"imaml": json.dumps(["mlp", [7]])}, "no model of the program"),
        ({"imaml": json.dumps(["mlp", {"hidden": [7]}])}, "a model of another version"),
        ({"imaml": json.dumps(["mlp", {"width": 7}])}, "a model of another version"),
    ]:
        safetensors.save_file(MLP().state_dict(), path, metadata)
        with pytest.raises(CheckpointError, match=re.escape(message)):
            load_model(tmp_path)


def test_without_the_extra_it_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "safetensors", None)
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    with pytest.raises(ImportError, match=r"A saved model needs safetensors.*: pip install 'imaml\[train\]'"):
        save_model(tmp_path, MLP())
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(ImportError, match=r"A saved model needs safetensors: pip install 'imaml\[train\]'"):
        load_model(tmp_path)
