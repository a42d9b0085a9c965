import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from imaml_solvers import LinearOperator
from tests.solvers.systems import F64, noise


def test_a_matrix_serves_a_batch_and_a_batch_of_matrices_its_own_vectors():
    matrices, x = noise(3, 4, 4), noise(3, 4, seed=2)
    expected = torch.einsum("bij,bj->bi", matrices, x)
    torch.testing.assert_close(LinearOperator.from_matrix(matrices).mv(x), expected)
    torch.testing.assert_close(LinearOperator.from_matrix(matrices[0]).mv(x), x @ matrices[0].T)


@pytest.mark.parametrize("batch", [(), (3,), (2, 3)])
def test_one_matrix_serves_a_batch_in_one_product(batch):
    class Names(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.append(func.overloadpacket.__name__)
            return func(*args, **(kwargs or {}))

    matrix, x, seen = noise(4, 4), noise(*batch, 4, seed=2), []
    with Names():
        found = LinearOperator.from_matrix(matrix).mv(x)
    assert "mm" in seen or "mv" in seen
    torch.testing.assert_close(found, torch.einsum("ij,...j->...i", matrix, x))


@pytest.mark.parametrize("shape", [(3,), (2, 3), (2, 3, 4)])
def test_a_matrix_must_be_square(shape):
    with pytest.raises(ValueError, match=r"\(\*batch, n, n\). Got \("):
        LinearOperator.from_matrix(torch.ones(shape))


def test_a_vector_must_fit():
    with pytest.raises(ValueError, match=r"fit the matrix \(3, 3\) of torch.float64. Got \(3,\) of torch.float32"):
        LinearOperator.from_matrix(torch.eye(3, dtype=F64)).mv(torch.ones(3))


def test_an_operator_needs_a_function():
    with pytest.raises(TypeError, match="function of a tensor. Got Tensor"):
        LinearOperator(torch.eye(3))
