import pytest
import torch

from imaml_solvers import Solution, Status


@pytest.mark.parametrize("status", Status, ids=lambda status: status.name)
def test_every_status_has_a_sentence(status):
    assert status.message.endswith(".") and status.message[0].isupper()


@pytest.mark.parametrize(
    ("status", "remedy"),
    [
        (Status.MAX_STEPS, "more steps"),
        (Status.BREAKDOWN, "damping"),
        (Status.BREAKDOWN, "MINRES"),
        (Status.BREAKDOWN, "curvature='ggn'"),
        (Status.BREAKDOWN, "larger lambda"),
        (Status.BREAKDOWN, "gmres"),
        (Status.NONFINITE, "float64"),
        (Status.STAGNATED, "float64"),
    ],
)
def test_every_failure_says_what_to_change(status, remedy):
    assert remedy in status.message


def test_statuses_compare_elementwise_and_come_back_from_integers():
    status = torch.tensor([Status.CONVERGED, Status.BREAKDOWN, Status.BUDGET_SPENT, Status.MAX_STEPS])
    assert (status == Status.BREAKDOWN).tolist() == [False, True, False, False]
    assert torch.tensor(3) == Status.BREAKDOWN and Status(status[1].item()) is Status.BREAKDOWN
    solution = Solution(torch.zeros(4, 2), status, torch.zeros(4), torch.zeros(4))
    assert solution.success.tolist() == [True, False, True, False]
