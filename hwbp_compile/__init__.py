"""hwbp_compile: a ``torch.compile`` backend that runs the backward pass of residual models in parallel."""

from .control.monitor import monitor as monitor
from .control.schedule import IterationsSchedule as IterationsSchedule
from .control.settings import set_iterations as set_iterations
from .errors import ModelError as ModelError
from .errors import OptionError as OptionError
from .options import Options as Options
from .options import list_options as list_options
from .report.explain import explain as explain
from .report.fidelity import Fidelity as Fidelity
from .report.fidelity import fidelity as fidelity
from .report.recommend import Recommendation as Recommendation
from .report.recommend import recommend as recommend
from .solvers import solve as solve
from .stacking import stack_parameters as stack_parameters
from .stacking import unstack_parameters as unstack_parameters

__version__ = "0.1.0"
__all__ = [
    "Fidelity",
    "IterationsSchedule",
    "ModelError",
    "OptionError",
    "Options",
    "Recommendation",
    "explain",
    "fidelity",
    "list_options",
    "monitor",
    "recommend",
    "set_iterations",
    "solve",
    "stack_parameters",
    "unstack_parameters",
]
