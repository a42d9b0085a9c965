"""torch's forward AD imports a module of torch that uses a deprecated part of torch."""

import warnings

import pytest
import torch


@pytest.fixture(autouse=True, scope="session")
def _import_forward_ad() -> None:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".torch.jit.script. is deprecated", category=DeprecationWarning)
        torch.func.jvp(torch.sin, (torch.ones(()),), (torch.ones(()),))
