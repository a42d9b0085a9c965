"""One start of two processes for all tests."""

import pytest

from tests.distributed import cases, training
from tests.distributed.launch import on_two_ranks


@pytest.fixture(scope="session")
def found():
    """Results of both ranks by the name of the function."""
    return on_two_ranks(cases.EQUAL | cases.OTHERS | training.FUNCTIONS)
