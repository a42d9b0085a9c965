"""Which settings are predicted, and which of them are measured."""

from dataclasses import replace

import pytest
import torch

from imaml import FOMAML, MAML, Adam, GradientDescent, ImplicitMAML
from imaml.planning._predict import costs_of
from imaml.planning._settings import every, few, sizes

CPU, TASKS = torch.device("cpu"), 6
INNER = GradientDescent(lr=0.1, steps=9)
ENGINES = [
    MAML(inner=INNER),
    MAML(inner=Adam(lr=0.1, steps=9), truncate=2),
    MAML(inner=INNER, microbatch_size=2),
    MAML(inner=INNER, chunk_size="auto"),
    FOMAML(inner=INNER),
    ImplicitMAML(inner=INNER),
    ImplicitMAML(inner=INNER, curvature="ggn"),
]
each_engine = pytest.mark.parametrize("engine", ENGINES, ids=lambda engine: type(engine).__name__)


def measured(engine, tasks=TASKS):
    return few(costs_of(engine), CPU, tasks)


def predicted(engine):
    return every(costs_of(engine), CPU, TASKS)


def test_few_settings_of_maml_are_measured():
    smallest = {"chunk_size": 1}
    assert measured(MAML(inner=INNER)) == [
        {},
        smallest,
        {"chunk_size": TASKS},
        {"hvp": "forward-over-reverse"},
        smallest | {"linearize": True},
        smallest | {"checkpoints": 3},
        smallest | {"storage": "disk"},
    ]


def test_few_settings_of_the_others_are_measured():
    ends = [{}, {"chunk_size": 1}, {"chunk_size": TASKS}]
    assert measured(FOMAML(inner=INNER)) == ends
    rebuilt = {"linearize": False}
    assert measured(ImplicitMAML(inner=INNER)) == [*ends, rebuilt, {"chunk_size": 1} | rebuilt]


def test_one_task_has_no_sizes_of_chunks():
    assert measured(FOMAML(inner=INNER), tasks=1) == [{}]
    assert sizes(1) == [1] and sizes(6) == [6, 3, 2, 1]


@each_engine
def test_what_is_measured_are_variants_and_modes_of_products(engine):
    variants = [{}, {"hvp": "forward-over-reverse"}, *costs_of(engine).variants(CPU)]
    for options in measured(engine):
        assert {name: value for name, value in options.items() if name != "chunk_size"} in variants


@each_engine
def test_no_setting_stands_twice_or_is_refused(engine):
    for found in (measured(engine), predicted(engine)):
        engines = [replace(engine, **options) for options in found]
        names = list(map(repr, engines))  # engines with linearize=1 and True are equal
        assert len(set(names)) == len(names)


def test_slices_of_examples_and_fixed_options_leave_no_graph_to_keep():
    for engine in (
        MAML(inner=INNER, microbatch_size=2),
        MAML(inner=INNER, microbatch_size=2, checkpoints=4),
        MAML(inner=INNER, linearize=False),
        MAML(inner=INNER, linearize=1),
    ):
        assert all("linearize" not in options for options in measured(engine) + predicted(engine))
        assert costs_of(engine).numbers_of_graphs == [0]


@pytest.mark.parametrize(("steps", "some"), [(9, [4, 2, 1]), (4, [2, 1]), (3, [1]), (2, [1]), (1, [])])
def test_half_and_a_quarter_of_the_graphs_and_the_last_are_predicted(steps, some):
    inner = GradientDescent(lr=0.1, steps=steps)

    def numbers(**options):
        return [repr(each["linearize"]) for each in predicted(MAML(inner=inner, chunk_size=1, **options)) if each]

    assert numbers(checkpoints=2) == numbers(storage="disk") == list(map(repr, some))
    found = [each.get("linearize") for each in predicted(MAML(inner=inner, chunk_size=1))]
    assert [repr(each) for each in found if each is not None] == list(map(repr, [True, *some, False]))
    assert costs_of(MAML(inner=inner)).numbers_of_graphs == [steps, *some, 0]
    assert costs_of(MAML(inner=inner, checkpoints=2)).numbers_of_graphs == [0]
