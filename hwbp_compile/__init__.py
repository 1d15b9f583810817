"""hwbp_compile: a ``torch.compile`` backend that runs the backward pass of residual models in parallel."""

from .errors import OptionError as OptionError
from .options import Options as Options
from .options import list_options as list_options
from .report.explain import explain as explain
from .solvers import solve as solve
from .stacking import stack_parameters as stack_parameters
from .stacking import unstack_parameters as unstack_parameters

__version__ = "0.1.0"
__all__ = [
    "OptionError",
    "Options",
    "explain",
    "list_options",
    "solve",
    "stack_parameters",
    "unstack_parameters",
]
