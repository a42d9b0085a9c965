"""What a meta-gradient may cost, in counts that no machine and no load change: upper limits, to be lowered when met."""

import pytest

from benchmarks.reference import support_gradients
from benchmarks.rivals import METHODS
from benchmarks.workloads import WORKLOADS
from imaml.measure import counted


@pytest.mark.parametrize(
    ("method", "operations", "arithmetic"),
    [
        ("imaml MAML", 475, 8.8),
        ("imaml MAML, chunk_size=1", 1780, 11.8),
        ("imaml MAML, checkpoints=4", 610, 11.8),
        ("imaml FOMAML", 260, 4.0),
        ("imaml ImplicitMAML", 1390, 13.0),
    ],
)
def test_operations_and_arithmetic(method, operations, arithmetic):
    """Of a call after the first, on 3 tasks with 3 inner steps (the solve: 5 products)."""
    problem = WORKLOADS["tiny"].problem(3)
    call = METHODS[method].prepare(problem)
    call()
    counts, unit = counted(call), counted(lambda: support_gradients(problem, math=True))
    assert counts.operations <= operations
    assert counts.flops / unit.flops <= arithmetic + 1e-9
