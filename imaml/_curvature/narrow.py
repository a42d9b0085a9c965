"""Matrix products of a trace in the order that a BLAS is fast at."""

from __future__ import annotations

import torch

from imaml._torch import VIEWS

_BATCHED, _TRANSPOSE = torch.ops.aten.bmm.default, torch.ops.aten.transpose.int


def transpose_tall(graph: torch.fx.GraphModule) -> None:
    """Write A B as (B' A')' where it has more rows than columns.

    Second derivatives are full of products of weights with transposed activations. MKL takes three to seven times as
    long for a batch of 40 x 40 matrices times 40 x 10 ones, as views of their transposes, as for the product the other
    way about.

    Args:
        graph: A trace, which is changed.
    """
    for node in graph.graph.nodes:
        if node.target in VIEWS:  # of what may be transposed now
            node.target = torch.ops.aten.reshape.default
        if node.target is not _BATCHED:
            continue
        a, b = node.args
        if not a.meta["val"].shape[1] > b.meta["val"].shape[2] > 1:
            continue
        with graph.graph.inserting_before(node):
            factors = [graph.graph.call_function(_TRANSPOSE, (factor, 1, 2)) for factor in (b, a)]
            product = graph.graph.call_function(_BATCHED, tuple(factors))
            found = graph.graph.call_function(_TRANSPOSE, (product, 1, 2))
        for made, like in ((factors[0], b), (factors[1], a), (found, node)):
            made.meta["val"] = like.meta["val"] if made is found else like.meta["val"].transpose(1, 2)
        product.meta["val"] = node.meta["val"].transpose(1, 2)
        node.replace_all_uses_with(found)
        graph.graph.erase_node(node)
    graph.recompile()
