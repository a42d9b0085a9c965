"""The losses of a chunk of tasks by themselves, for tests below a strategy."""

from imaml._curvature.curvature import Curvature
from imaml._curvature.derivatives import Derivatives
from imaml._curvature.product import Graph
from imaml._losses.loss import Loss
from imaml._losses.record import Record
from imaml._losses.replay import Role
from imaml._losses.slice import Slice
from imaml._losses.snapshot import Snapshot


def loss_of(objective, batch, tasks=1, role=Role.SUPPORT):
    """The loss of some tasks, and the parameters of the objective `(tasks, n)`."""
    snapshot = Snapshot.of(objective)
    return Loss(Slice(snapshot, Record(), batch, tasks, 0, role)), snapshot.theta.repeat(tasks, 1)


def gradient(loss, phi):
    return Derivatives().gradient(loss, phi, 0)


def curvature(loss, phi, mode="auto", graph=Graph.REBUILT):
    return Curvature(Derivatives(), loss, phi, 0, mode=mode, graph=graph)
