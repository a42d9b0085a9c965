import pytest
import torch
from torch import nn

from imaml.models import MLP, Conv4


def test_mlp_is_the_sinusoid_network_of_the_papers():
    model = MLP()
    assert model(torch.randn(7, 3, 1)).shape == (7, 3, 1)
    assert [tuple(p.shape) for p in model.parameters()] == [(40, 1), (40,), (40, 40), (40,), (1, 40), (1,)]


def test_mlp_computes_what_it_says():
    model = MLP(in_features=3, out_features=2, hidden=(4, 5), activation=nn.Tanh).double()
    x = torch.randn(6, 3, dtype=torch.float64)
    w1, b1, w2, b2, w3, b3 = model.parameters()
    expected = torch.tanh(torch.tanh(x @ w1.T + b1) @ w2.T + b2) @ w3.T + b3
    torch.testing.assert_close(model(x), expected, rtol=1e-12, atol=1e-12)


def test_mlp_without_hidden_layers_is_linear():
    model = MLP(in_features=3, out_features=2, hidden=())
    assert [type(module) for module in model] == [nn.Linear]


def test_conv4_has_the_parameters_of_the_papers():
    model = Conv4(ways=5)
    # First convolution, three more, four BatchNorms, head of 2 x 2 x 64 features.
    expected = (9 * 64 + 64) + 3 * (9 * 64 * 64 + 64) + 4 * 2 * 64 + (256 * 5 + 5)
    assert sum(p.numel() for p in model.parameters()) == expected
    assert not list(model.buffers()), "running statistics would leak from task to task"


@pytest.mark.parametrize("size", [1, 16, 17, 28, 32, 33, 84])
def test_conv4_fits_images_of_any_size(size):
    model = Conv4(ways=3, channels=4, in_channels=2, image_size=size)
    assert model(torch.randn(6, 2, size, size)).shape == (6, 3)


def test_conv4_computes_what_it_says():
    model = Conv4(ways=3, channels=4).double()
    for parameter in model.parameters():
        nn.init.normal_(parameter)
    x = torch.randn(6, 1, 28, 28, dtype=torch.float64)
    *blocks, weight, bias = model.parameters()
    h = x
    for w, b, gain, offset in zip(*[iter(blocks)] * 4, strict=True):
        # A convolution as a product with every 3 x 3 patch, two pixels apart, of the padded image.
        side = (h.shape[-1] + 1) // 2
        h = (w.flatten(1) @ nn.functional.unfold(h, 3, padding=1, stride=2) + b[:, None]).unflatten(2, (side, side))
        mean, variance = h.mean((0, 2, 3), keepdim=True), h.var((0, 2, 3), correction=0, keepdim=True)
        h = (h - mean) / (variance + 1e-5).sqrt() * gain[:, None, None] + offset[:, None, None]
        h = h.clamp_min(0)
    torch.testing.assert_close(model(x), h.reshape(6, -1) @ weight.T + bias, rtol=1e-10, atol=1e-10)


def test_conv4_uses_batch_statistics_also_when_evaluating():
    model = Conv4(ways=3, channels=4)
    x = torch.randn(6, 1, 28, 28)
    torch.testing.assert_close(model.eval()(x), model.train()(x), rtol=0, atol=0)


def test_conv4_is_initialised_as_cited():
    model = Conv4(ways=5)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            assert not parameter.any()
        elif parameter.ndim == 1:
            assert (parameter == 1).all()
        else:
            fan_out, fan_in = parameter.shape[:2]
            field = parameter[0, 0].numel()
            bound = (6 / (field * (fan_in + fan_out))) ** 0.5
            assert 0.97 * bound < parameter.abs().max() <= bound


def test_the_seed_decides_the_initial_weights():
    def weights():
        torch.manual_seed(5)
        return Conv4(ways=5).features[3][0].weight

    assert torch.equal(weights(), weights())
