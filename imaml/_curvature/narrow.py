"""Matrix products of a trace in the order that a BLAS is fast at."""

from __future__ import annotations

import torch

from imaml._torch import VIEWS

_BATCHED, _SINGLE = torch.ops.aten.bmm.default, torch.ops.aten.mm.default
_FEW = 16
"""Columns that do not fill a vector register of the processor."""
_TRANSPOSE = torch.ops.aten.transpose.int


def transpose_tall(graph: torch.fx.GraphModule) -> None:
    """Write A B as (B' A')' where it has more rows than columns, and where it is no batch, only few of these.

    Second derivatives are full of products of weights with transposed activations. MKL takes three to seven times as
    long for a batch of 40 x 40 matrices times 40 x 10 ones, as views of their transposes, as for the product the other
    way about, and three times for one of 64 x 980 and 980 x 9.

    Args:
        graph: A trace, which is changed.
    """
    for node in graph.graph.nodes:
        if node.target in VIEWS:  # of what may be transposed now
            node.target = torch.ops.aten.reshape.default
        if node.target not in (_BATCHED, _SINGLE):
            continue
        a, b = node.args
        rows, columns = node.meta["val"].shape[-2:]
        if not rows > columns > 1 or node.target is _SINGLE and columns > _FEW:
            continue
        with graph.graph.inserting_before(node):
            factors = [graph.graph.call_function(_TRANSPOSE, (factor, -2, -1)) for factor in (b, a)]
            product = graph.graph.call_function(node.target, tuple(factors))
            found = graph.graph.call_function(_TRANSPOSE, (product, -2, -1))
        for made, like in ((factors[0], b), (factors[1], a), (product, node)):
            made.meta["val"] = like.meta["val"].transpose(-2, -1)
        found.meta["val"] = node.meta["val"]
        node.replace_all_uses_with(found)
        graph.graph.erase_node(node)
    graph.recompile()
