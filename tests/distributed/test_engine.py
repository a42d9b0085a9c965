"""Two gloo processes, each with its tasks, against one with all of them."""

import pytest
import torch
import torch.nn.functional as F

from imaml import MAML, GradientDescent, Objective
from imaml.data import Sinusoid
from imaml.models import MLP
from tests.distributed import cases


def assert_equal(ours, theirs, **tolerance):
    torch.testing.assert_close(ours, theirs, **({"rtol": 1e-12, "atol": 1e-14} | tolerance))


@pytest.mark.parametrize("name", cases.EQUAL)
def test_every_rank_has_the_meta_gradient_of_one_process(found, name):
    first, second = found[name]
    assert_equal(first, cases.EQUAL[name](None))
    for key, value in first.items():
        assert torch.equal(value, second[key])


def test_backward_and_loss_are_of_all_tasks_and_the_report_of_the_ranks_own(found):
    gradients, loss, query_loss, metric = cases.backward(None)
    for rank, (theirs, mean, own_losses, own_metric) in enumerate(found["backward"]):
        assert_equal(theirs, gradients)
        assert_equal(mean, loss)
        assert_equal(own_losses, query_loss[rank::2])
        assert_equal(own_metric, metric[rank::2])


def test_the_report_of_a_rank_without_a_task_has_tensors_of_length_0(found):
    first, (lengths, shapes, text) = found["without_a_task"]
    assert first[:2] == ([1, 1], [[3, 1], [3, 1]])
    assert (lengths, shapes) == ([0, 0], [[3, 0], [3, 0]])
    assert "mean of 0 tasks" in text


@pytest.mark.parametrize("name", ["evaluated", "the_same_tasks_everywhere"])
def test_evaluation_and_the_same_tasks_on_every_rank(found, name):
    for ours in found[name]:
        assert_equal(ours, cases.OTHERS[name](None))


def test_windows_of_a_training_go_on_on_every_rank_by_itself(found):
    expected, weight, step = cases.windows(None)
    for rank, (ours, own, its_step) in enumerate(found["windows"]):
        assert_equal(ours, expected)
        assert_equal(own, weight[rank::2])
        assert its_step == step == 6


def test_dtypes_are_those_of_the_parameters_on_a_rank_without_a_task_too(found):
    for results in found["mixed_dtypes"]:
        for (loss, ours), (expected_loss, expected) in zip(results, cases.mixed_dtypes(None), strict=True):
            assert loss == pytest.approx(expected_loss, rel=1e-6)
            assert_equal(ours, expected, rtol=1e-6, atol=1e-7)


def test_a_failing_rank_raises_its_own_error_and_the_other_says_so(found):
    first, second = found["a_rank_with_nan"]
    assert first == (
        "NonFiniteError",
        "Rank 1 could not compute its tasks, so there is no mean over all ranks. Its own error says why.",
    )
    assert second[0] == "NonFiniteError" and "task 1" in second[1]
    first, second = found["a_rank_with_a_wrong_argument"]
    assert first[0] == "NonFiniteError" and "Rank 1 " in first[1]
    assert second[0] == "TypeError" and "list of Task" in second[1]


@pytest.mark.parametrize(
    ("name", "positions"), [("skipped_on_one_rank", ((), (1,))), ("skipped_on_a_whole_rank", ((), (0, 1)))]
)
def test_skipped_tasks_are_left_out_of_the_mean_over_all_ranks(found, name, positions):
    loss, gradients, _ = cases.OTHERS[name](None)
    for rank, (ours, theirs, skipped) in enumerate(found[name]):
        assert_equal(ours, loss)
        assert_equal(theirs, gradients)
        assert skipped == positions[rank]


def test_every_rank_knows_that_all_tasks_of_all_ranks_were_skipped(found):
    for kind, text in found["skipped_everywhere"]:
        assert kind == "NonFiniteError" and "all 4 were skipped" in text


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("no_task", "at least one task on some rank"),
        ("other_values", "ranks 0 and 1 differ in value: seed"),
        ("other_names", "ranks 0 and 1 differ by name"),
    ],
)
def test_what_no_rank_can_compute_is_the_same_error_on_all(found, name, message):
    for kind, text in found[name]:
        assert kind == "ValueError" and message in text


def test_a_call_is_one_all_reduce_and_only_the_first_compares_the_parameters(found):
    size = 4 * 2 + 2 + 3 * 4 + 4 + 3 + 2  # the head, the body, loss and numbers of tasks, a flag for each rank
    for reduced, gathered in found["collectives"]:
        assert reduced == [size] * 3
        assert gathered == [3]


def test_the_loop_of_the_page_is_that_of_one_process(found):
    torch.manual_seed(0)
    model = MLP()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    objective, engine = Objective(model, F.mse_loss), MAML(inner=GradientDescent(lr=0.01, steps=5))
    for step in range(10):
        optimizer.zero_grad()
        engine(objective, Sinusoid().batch("train", step, 25)).loss.backward()
        optimizer.step()
    first, second = found["the_page"]
    assert_equal(first, [p.detach() for p in model.parameters()], rtol=1e-4, atol=1e-5)
    for mine, others in zip(first, second, strict=True):
        assert torch.equal(mine, others)


@pytest.mark.parametrize("group", [0, "WORLD"])
def test_what_is_no_group_of_this_process(group):
    objective, tasks = Objective(cases.make_model(), F.mse_loss), cases.make_tasks(1)
    with pytest.raises(TypeError, match=r"ProcessGroup that this process is in.*Got"):
        cases.ENGINES["MAML"](objective, tasks, group=group)


def test_a_process_alone_needs_a_task():
    with pytest.raises(ValueError, match="at least one task"):
        cases.no_task(None)
