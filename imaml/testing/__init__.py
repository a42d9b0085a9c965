"""Tests for a solver or a strategy of one's own: drawn problems and two conformance suites.

`spectra`, `spd_matrices`, `quadratic_tasks`, `small_models` and `task_batches` are hypothesis strategies. Everything
random in a draw comes from a drawn seed: draws are reproducible, shrink, and leave the global random state alone. They
are on the CPU. `solver_conformance` and `strategy_conformance` return classes that pytest collects:

    TestMySolver = solver_conformance(lambda: MySolver(max_steps=200))
    TestMyStrategy = strategy_conformance(lambda inner: MyStrategy(inner=inner), against="maml")

Needs `pip install 'imaml[testing]'`.
"""

try:
    import hypothesis as _hypothesis  # noqa: F401
    import pytest as _pytest
except ModuleNotFoundError as error:
    raise ImportError(f"imaml.testing needs {error.name}: pip install 'imaml[testing]'", name=error.name) from error

_pytest.register_assert_rewrite("imaml.testing._solver_suite", "imaml.testing._strategy_suite")

from imaml.testing._models import small_models as small_models  # noqa: E402
from imaml.testing._quadratic import QuadraticTasks as QuadraticTasks  # noqa: E402
from imaml.testing._quadratic import quadratic_tasks as quadratic_tasks  # noqa: E402
from imaml.testing._solver_suite import SolverConformance as SolverConformance  # noqa: E402
from imaml.testing._solver_suite import solver_conformance as solver_conformance  # noqa: E402
from imaml.testing._spectra import spd_matrices as spd_matrices  # noqa: E402
from imaml.testing._spectra import spectra as spectra  # noqa: E402
from imaml.testing._strategy_suite import StrategyConformance as StrategyConformance  # noqa: E402
from imaml.testing._strategy_suite import strategy_conformance as strategy_conformance  # noqa: E402
from imaml.testing._tasks import task_batches as task_batches  # noqa: E402
