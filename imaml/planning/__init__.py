"""Memory and cost before a run: see `MetaGradient.plan`."""

from imaml.planning._forecast import Forecast as Forecast
from imaml.planning._forecast import Setting as Setting
