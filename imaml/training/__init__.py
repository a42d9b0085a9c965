"""Meta-training: a plan, a trainer that follows it, evaluation, and a folder that outlives interruptions."""

from imaml._engine.files import make_folder as make_folder
from imaml._engine.files import replace_file as replace_file
from imaml._errors import CheckpointError as CheckpointError
from imaml.training._callbacks import Callback as Callback
from imaml.training._callbacks import Callbacks as Callbacks
from imaml.training._checkpoint import load_checkpoint as load_checkpoint
from imaml.training._checkpoint import save_checkpoint as save_checkpoint
from imaml.training._evaluation import Episodes as Episodes
from imaml.training._evaluation import Evaluation as Evaluation
from imaml.training._evaluation import evaluate as evaluate
from imaml.training._plan import Plan as Plan
from imaml.training._run import RunFolder as RunFolder
from imaml.training._saved_model import load_model as load_model
from imaml.training._saved_model import save_model as save_model
from imaml.training._tensorboard import TensorBoard as TensorBoard
from imaml.training._trainer import StepRecord as StepRecord
from imaml.training._trainer import Trainer as Trainer
from imaml.training._wandb import WandB as WandB
