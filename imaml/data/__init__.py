"""Episodes of few-shot tasks, as `TaskBatch`es."""

from imaml.data._banking77 import Banking77 as Banking77
from imaml.data._episodes import Episodes as Episodes
from imaml.data._episodes import Split as Split
from imaml.data._few_shot import FewShot as FewShot
from imaml.data._few_shot import ImageSet as ImageSet
from imaml.data._glyphs import Glyphs as Glyphs
from imaml.data._omniglot import Omniglot as Omniglot
from imaml.data._sinusoid import Sinusoid as Sinusoid
