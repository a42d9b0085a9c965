import math

import pytest

from imaml.training import Plan


def test_progress_is_that_of_the_budget_which_ends_first():
    plan = Plan(steps=100, minutes=2.0)
    assert plan.progress(25, 30.0) == 0.25
    assert plan.progress(25, 60.0) == 0.5
    assert plan.progress(100, 0.0) == 1.0
    assert plan.progress(0, 120.0) == 1.0
    assert Plan(steps=0).progress(0, 0.0) >= 1


def test_the_cosine_goes_from_the_rate_to_zero_and_the_constant_stays():
    cosine = Plan(meta_lr=0.5, schedule="cosine")
    assert cosine.learning_rate(0.0) == 0.5
    assert cosine.learning_rate(1 / 3) == pytest.approx(0.375)
    assert cosine.learning_rate(1.0) == pytest.approx(0.0, abs=1e-15)
    assert Plan(meta_lr=0.5, schedule="constant").learning_rate(0.9) == 0.5


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("steps", -1),
        ("meta_batch", 0),
        ("eval_every", 0),
        ("val_tasks", 0),
        ("eval_tasks", 0),
        ("eval_inner_steps", -1),
        ("meta_lr", 0.0),
        ("meta_lr", math.inf),
        ("minutes", 0.0),
        ("minutes", math.nan),
    ],
)
def test_values_out_of_range_are_named(name, value):
    with pytest.raises(ValueError, match=rf"`{name}`.*Got"):
        Plan(**{name: value})
