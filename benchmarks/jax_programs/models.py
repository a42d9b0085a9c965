"""The networks of the workloads as functions of `(parameters, inputs)`, with names and layouts of torch's modules."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

Named = dict[str, Array]
EPS = 1e-5
"""Of both normalisations, torch's default."""


def linear(p: Named, name: str, x: Array) -> Array:
    return x @ p[f"{name}.weight"].T + p[f"{name}.bias"]


def mlp(p: Named, x: Array, *, activation: str) -> Array:
    act = {"ReLU": jax.nn.relu, "Tanh": jnp.tanh}[activation]
    *hidden, last = sorted({name.partition(".")[0] for name in p}, key=int)
    for name in hidden:
        x = act(linear(p, name, x))
    return linear(p, last, x)


def conv4(p: Named, images: Array) -> Array:
    x = images.transpose(0, 2, 3, 1)
    for i in range(4):
        x = _convolution(x, p[f"features.{i}.0.weight"]) + p[f"features.{i}.0.bias"]
        x = (x - x.mean((0, 1, 2))) * lax.rsqrt(x.var((0, 1, 2)) + EPS)
        x = jax.nn.relu(x * p[f"features.{i}.1.weight"] + p[f"features.{i}.1.bias"])
    return linear(p, "head", x.transpose(0, 3, 1, 2).reshape(len(x), -1))


def _convolution(x: Array, weight: Array) -> Array:
    """3 x 3 with stride 2 and padding 1, as patches times a matrix: `lax.conv` takes ten times as long on a CPU."""
    n, height, width, channels = x.shape
    height, width = (height + 1) // 2, (width + 1) // 2
    x = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    shifted = [x[:, i : i + 2 * height - 1 : 2, j : j + 2 * width - 1 : 2] for i in range(3) for j in range(3)]
    patches = jnp.concatenate(shifted, -1).reshape(n * height * width, 9 * channels)
    return (patches @ weight.transpose(2, 3, 1, 0).reshape(9 * channels, -1)).reshape(n, height, width, -1)


def transformer(p: Any, tokens: Array, *, heads: int) -> Array:
    """Layers one by one, or, of `stacked` parameters, by a scan that recomputes each of them in derivatives."""
    if isinstance(p, dict):
        layer = partial(_layer, heads=heads)
        x = p["embed.weight"][tokens]
        for number in range(_layers(p)):
            x = layer(x, _of_layer(p, number))
        return linear(p, "head", x.mean(1))
    rest, layers = p

    def step(x: Array, layer: Named) -> tuple[Array, None]:
        return _layer(x, layer, heads=heads), None

    x, _ = lax.scan(jax.checkpoint(step, prevent_cse=False), rest["embed.weight"][tokens], layers)
    return linear(rest, "head", x.mean(1))


def stacked(p: Named) -> tuple[Named, Named]:
    """What is outside of the layers of a transformer, and the layers' parameters along a first dimension."""
    layers = [_of_layer(p, number) for number in range(_layers(p))]
    rest = {name: value for name, value in p.items() if not name.startswith("encoder.layers.")}
    return rest, {name: jnp.stack([layer[name] for layer in layers]) for name in layers[0]}


def unstacked(p: tuple[Named, Named]) -> Named:
    rest, layers = p
    count = len(next(iter(layers.values())))
    return rest | {f"encoder.layers.{i}.{name}": value[i] for i in range(count) for name, value in layers.items()}


def _layers(p: Named) -> int:
    return sum(name.endswith("norm1.weight") for name in p)


def _of_layer(p: Named, number: int) -> Named:
    prefix = f"encoder.layers.{number}."
    return {name.removeprefix(prefix): value for name, value in p.items() if name.startswith(prefix)}


def _layer(x: Array, p: Named, *, heads: int) -> Array:
    n, length, width = x.shape
    projected = _normalised(p, "norm1", x) @ p["self_attn.in_proj_weight"].T + p["self_attn.in_proj_bias"]
    q, k, v = (part.reshape(n, length, heads, width // heads) for part in jnp.split(projected, 3, -1))
    weights = jax.nn.softmax(jnp.einsum("nthd,nshd->nhts", q, k) * (width // heads) ** -0.5, -1)
    mixed = jnp.einsum("nhts,nshd->nthd", weights, v).reshape(n, length, width)
    x = x + linear(p, "self_attn.out_proj", mixed)
    return x + linear(p, "linear2", jax.nn.relu(linear(p, "linear1", _normalised(p, "norm2", x))))


def _normalised(p: Named, name: str, x: Array) -> Array:
    centred = x - x.mean(-1, keepdims=True)
    return centred * lax.rsqrt(x.var(-1, keepdims=True) + EPS) * p[f"{name}.weight"] + p[f"{name}.bias"]
