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


def kept_products(matrix):
    """An operator that hands out the same tensor every time, which nobody may write to."""
    products = []

    def mv(x):
        products.append(x @ matrix.mT)
        return products[-1]

    return LinearOperator(mv), products


@pytest.mark.parametrize("by", [0.7, torch.tensor([0.5, 2.0, 3.0], dtype=torch.float64)], ids=["number", "diagonal"])
def test_a_shifted_operator_has_the_diagonal_besides(by):
    matrix, x = torch.randn(4, 3, 3, dtype=torch.float64), torch.randn(4, 3, dtype=torch.float64)
    expected = (matrix @ x.unsqueeze(-1)).squeeze(-1) + by * x
    torch.testing.assert_close(LinearOperator.from_matrix(matrix).shifted(by).mv(x), expected, rtol=1e-14, atol=1e-14)


@pytest.mark.parametrize("by", [torch.tensor(1.7), torch.tensor([0.5, 2.0, 3.0])], ids=["number", "diagonal"])
def test_a_scaled_operator_is_divided_on_both_sides(by):
    by = by.double()
    matrix, x = torch.randn(3, 3, dtype=torch.float64), torch.randn(4, 3, dtype=torch.float64)
    whole = by.expand(3)
    expected = x @ (matrix / whole / whole.unsqueeze(-1)).mT
    torch.testing.assert_close(LinearOperator.from_matrix(matrix).scaled(by).mv(x), expected, rtol=1e-14, atol=1e-14)


def test_an_operator_is_computed_in_the_dtype_that_is_asked_for():
    seen = []
    op = LinearOperator(lambda x: seen.append(x.dtype) or 2 * x).computed_in(torch.float32)
    x = torch.randn(3, dtype=torch.float64)
    assert op.mv(x).dtype == torch.float64 and seen == [torch.float32]
    assert op.mv(x.float()).dtype == torch.float32


@pytest.mark.parametrize(
    "made",
    [
        lambda op: op.shifted(2.0),
        lambda op: op.scaled(torch.tensor(2.0, dtype=torch.float64)),
        lambda op: op.scaled(torch.full((3,), 2.0, dtype=torch.float64)),
        lambda op: op.computed_in(torch.float64).shifted(2.0),
    ],
    ids=["shifted", "scaled", "scaled by entry", "cast and shifted"],
)
def test_products_that_an_operator_keeps_are_not_written_to(made):
    op, products = kept_products(torch.randn(3, 3, dtype=torch.float64))
    x = torch.randn(2, 3, dtype=torch.float64)
    made(op).mv(x)
    before = [p.clone() for p in products]
    made(op).mv(x)
    assert torch.equal(products[0], before[0]) and products[0]._version == 0


def test_what_is_made_of_an_operator_says_that_its_products_are_new():
    op = LinearOperator(lambda x: x)
    assert not op.makes_new and op.shifted(1.0).makes_new and op.scaled(torch.tensor(2.0)).makes_new
    assert not op.computed_in(torch.float64).makes_new
