"""The inner loop: how a task's parameters are adapted."""

from imaml.inner._adaptive import Adam as Adam
from imaml.inner._adaptive import AdamW as AdamW
from imaml.inner._adaptive import RMSprop as RMSprop
from imaml.inner._base import InnerOptimizer as InnerOptimizer
from imaml.inner._base import InnerSolver as InnerSolver
from imaml.inner._gradient_descent import GradientDescent as GradientDescent
from imaml.inner._muon import Muon as Muon
from imaml.inner._newton import NewtonCG as NewtonCG
from imaml.inner._normalized import LAMB as LAMB
from imaml.inner._normalized import NormalizedDescent as NormalizedDescent
from imaml.inner._rates import Rates as Rates
from imaml.inner._schedules import warmup_cosine as warmup_cosine
from imaml.inner._schedules import warmup_linear as warmup_linear
from imaml.inner._sign import Lion as Lion
from imaml.inner._sign import SignDescent as SignDescent
from imaml.inner._torch_optimizer import TorchOptimizer as TorchOptimizer
