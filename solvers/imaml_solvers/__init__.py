"""Matrix-free solvers of batches of linear systems A x = b in PyTorch.

A solver needs products with A alone. It solves every system of a batch at once, each with its own stopping, never
raises on numerics, and says in a `Status` how each solve ended.
"""

from imaml_solvers._cg import CG as CG
from imaml_solvers._dense import Dense as Dense
from imaml_solvers._jacobi import Jacobi as Jacobi
from imaml_solvers._minres import MINRES as MINRES
from imaml_solvers._neumann import Neumann as Neumann
from imaml_solvers._nystrom import Nystrom as Nystrom
from imaml_solvers._nystrom import NystromInverse as NystromInverse
from imaml_solvers._operator import LinearOperator as LinearOperator
from imaml_solvers._preconditioner import Preconditioner as Preconditioner
from imaml_solvers._scipy import ScipySolver as ScipySolver
from imaml_solvers._solution import Solution as Solution
from imaml_solvers._solution import Status as Status
from imaml_solvers._solver import LinearSolver as LinearSolver
