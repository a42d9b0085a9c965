"""A trace in two parts: what does not depend on some of its arguments, and what is made of that when they come."""

from __future__ import annotations

from collections.abc import Collection

from torch.fx import Graph, GraphModule, Node


def split(graph: GraphModule, late: Collection[int], first: int) -> tuple[GraphModule, GraphModule]:
    """Split a trace at arguments that come later, as the cotangents of a step come after the step.

    What the second part uses of the first is handed on, but for views, which it takes again.

    Args:
        graph: A trace whose output is a tuple.
        late: Which of its arguments come later.
        first: How many of its outputs, which depend on none of these, the first part has.

    Returns:
        The first part, of the other arguments, returns these outputs and what is handed on. The second, of all
        arguments and what was handed on, returns the other outputs.

    Raises:
        ValueError: An output of the first part depends on what comes later.
    """
    nodes = list(graph.graph.nodes)
    arguments, outputs = [n for n in nodes if n.op == "placeholder"], nodes[-1].args[0]
    after = {arguments[i] for i in late}
    for node in nodes:
        if any(source in after for source in node.all_input_nodes):
            after.add(node)
    mine, others = outputs[:first], outputs[first:]
    if any(output in after for output in mine):
        raise ValueError("An output of the first part depends on what comes later.")
    handed = _handed([n for n in nodes[:-1] if n in after and n.op != "placeholder"], others, after)
    residuals = [node for node in nodes if node in handed]
    before, copies = Graph(), dict[Node, Node]()
    for node in nodes[:-1]:
        if node not in after:
            copies[node] = before.node_copy(node, copies.__getitem__)
    before.output(tuple(None if o is None else copies[o] for o in (*mine, *residuals)))
    before.eliminate_dead_code()
    then, copies = Graph(), {}
    for node in arguments:
        copies[node] = then.node_copy(node)
    for i, node in enumerate(residuals):
        copies[node] = then.placeholder(f"residual_{i}")
        copies[node].meta = node.meta
    for node in nodes[:-1]:
        if node not in copies and all(source in copies for source in node.all_input_nodes):
            copies[node] = then.node_copy(node, copies.__getitem__)
    then.output(tuple(None if o is None else copies[o] for o in others))
    then.eliminate_dead_code()
    return GraphModule(graph, before), GraphModule(graph, then)


def _handed(late: Collection[Node], outputs: Collection[Node | None], after: Collection[Node]) -> set[Node]:
    """What is handed on to these nodes and outputs: values, and the values that views are taken of."""
    found = set[Node]()
    pending = [source for node in late for source in node.all_input_nodes if source not in after]
    pending += [output for output in outputs if output is not None and output not in after]
    while pending:
        node = pending.pop()
        if node in found or node.op in ("placeholder", "get_attr"):
            continue
        if getattr(node.target, "is_view", False):
            pending += node.all_input_nodes
        else:
            found.add(node)
    return found
