from .optimizer import make_optimizer as make_optimizer
from .optimizer import make_schedule as make_schedule
from .step import TrainStep as TrainStep
from .trainer import Intervals as Intervals
from .trainer import Trainer as Trainer
