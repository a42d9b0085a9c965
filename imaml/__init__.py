"""Meta-gradients: the gradient of the loss after a model has adapted to a task.

Exact `MAML`, first-order `FOMAML` and `ImplicitMAML` share one interface, `MetaGradient`.
"""

from imaml import verify as verify
from imaml._engine.inner_state import InnerState as InnerState
from imaml._engine.problem import Problem as Problem
from imaml._engine.report import MetaResult as MetaResult
from imaml._engine.report import Pullback as Pullback
from imaml._engine.report import Report as Report
from imaml._errors import CheckpointError as CheckpointError
from imaml._errors import CompileWarning as CompileWarning
from imaml._errors import DivergenceError as DivergenceError
from imaml._errors import DriftWarning as DriftWarning
from imaml._errors import NonFiniteError as NonFiniteError
from imaml._errors import PrecisionWarning as PrecisionWarning
from imaml._errors import SolverError as SolverError
from imaml._errors import SolverWarning as SolverWarning
from imaml._minibatches import Minibatches as Minibatches
from imaml._objective.bilevel import bilevel as bilevel
from imaml._objective.objective import Objective as Objective
from imaml._objective.recompute import recompute as recompute
from imaml._strategies.fomaml import FOMAML as FOMAML
from imaml._strategies.implicit import ImplicitMAML as ImplicitMAML
from imaml._strategies.maml import MAML as MAML
from imaml._strategies.meta_gradient import MetaGradient as MetaGradient
from imaml._tasks import Task as Task
from imaml._tasks import TaskBatch as TaskBatch
from imaml.inner import LAMB as LAMB
from imaml.inner import Adam as Adam
from imaml.inner import AdamW as AdamW
from imaml.inner import GradientDescent as GradientDescent
from imaml.inner import InnerOptimizer as InnerOptimizer
from imaml.inner import InnerSolver as InnerSolver
from imaml.inner import Lion as Lion
from imaml.inner import Muon as Muon
from imaml.inner import NewtonCG as NewtonCG
from imaml.inner import NormalizedDescent as NormalizedDescent
from imaml.inner import RMSprop as RMSprop
from imaml.inner import SignDescent as SignDescent
from imaml.inner import TorchOptimizer as TorchOptimizer
from imaml_solvers import CG as CG
from imaml_solvers import MINRES as MINRES
from imaml_solvers import Dense as Dense
from imaml_solvers import Jacobi as Jacobi
from imaml_solvers import LinearOperator as LinearOperator
from imaml_solvers import LinearSolver as LinearSolver
from imaml_solvers import Neumann as Neumann
from imaml_solvers import Nystrom as Nystrom
from imaml_solvers import NystromInverse as NystromInverse
from imaml_solvers import Preconditioner as Preconditioner
from imaml_solvers import ScipySolver as ScipySolver
from imaml_solvers import Solution as Solution
from imaml_solvers import Status as Status
