"""Reproducible randomness, one thread, and the folder of real data, for every test."""

import os
from pathlib import Path

import hypothesis
import pytest
import torch

from imaml._torch import load_forward_ad

# No deadline: the first example of a test pays for torch's lazy imports.
hypothesis.settings.register_profile("dev", deadline=None)
hypothesis.settings.register_profile("ci", deadline=None, derandomize=True, print_blob=True)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci" if "CI" in os.environ else "dev"))

# The tests' tensors are small: a second thread costs more to wake than it computes.
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True, scope="session")
def _load_forward_ad() -> None:
    """For tests that use `torch.func.jvp` themselves; the library does so before its own first use."""
    load_forward_ad()


@pytest.fixture(scope="session")
def data_folder() -> Path:
    """The folder of real data; tests that ask for it are skipped where there is none."""
    beside = Path(__file__).resolve().parents[2] / "shared" / "data"
    folder = Path(os.environ.get("IMAML_DATA", beside))
    if not folder.is_dir():
        pytest.skip(f"No real data at {folder}: set IMAML_DATA to a folder with omniglot28.npz.")
    return folder
