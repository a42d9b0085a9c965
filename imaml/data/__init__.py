"""Episodes of few-shot tasks, as `TaskBatch`es."""

from imaml.data._episodes import Episodes as Episodes
from imaml.data._few_shot import FewShot as FewShot
from imaml.data._omniglot import Omniglot as Omniglot
