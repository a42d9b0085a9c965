"""The solver suite fails for every broken solver, in the test meant for it."""

import pytest

from tests.testing import broken_solvers
from tests.testing.running import run_suite

CAUGHT_BY = {
    "CurvatureScaledInTheStepOnly": "test_well_conditioned_systems_are_solved",
    "DirectionFromTheOldResidual": "test_well_conditioned_systems_are_solved",
    "StaleIterate": "test_the_identity",
    "NoStepForSizeOne": "test_systems_of_size_one",
    "NaNAfterConvergence": "test_repeated_eigenvalues",
    "StepsOverNegativeCurvature": "test_indefinite_systems_are_solved_or_said_not_to_be",
    "AlwaysConverged": "test_singular_systems_are_not_solved",
    "AbsoluteTolerance": "test_batched_equals_one_by_one",
    "OneSystemForTheBatch": "test_batched_equals_one_by_one",
    "RaisesOnNumerics": "test_what_is_not_finite_is_said_and_stays_with_its_system",
    "OverwritesTheRightHandSide": "test_no_derivative_flows_and_nothing_is_changed_or_printed",
    "Prints": "test_no_derivative_flows_and_nothing_is_changed_or_printed",
    "AlwaysDouble": "test_batches_of_any_shape_keep_shape_and_dtype",
    "IgnoresItsStart": "test_a_start_is_used_or_refused",
    "SolvesThePreconditionedSystem": "test_a_preconditioner_is_used_or_refused",
    "SmallResidualIsReported": "test_well_conditioned_systems_are_solved",
}


def test_every_broken_solver_is_listed():
    here = broken_solvers.__name__
    defined = {n for n, v in vars(broken_solvers).items() if getattr(v, "__module__", "") == here}
    assert defined - {"Textbook"} == set(CAUGHT_BY)


@pytest.mark.parametrize("name", CAUGHT_BY)
def test_a_broken_solver_fails(tmp_path, name):
    failed, _ = run_suite(
        tmp_path,
        "solver",
        f"lambda: broken_solvers.{name}()",
        imports="from tests.testing import broken_solvers",
        only=CAUGHT_BY[name],
    )
    assert failed == {CAUGHT_BY[name]}


def test_without_the_defect_it_passes(tmp_path):
    failed, passed = run_suite(
        tmp_path, "solver", "lambda: broken_solvers.Textbook()", imports="from tests.testing import broken_solvers"
    )
    assert not failed and len(passed) >= 15
