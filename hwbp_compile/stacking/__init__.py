"""Parameters of equal blocks in one tensor."""

from .stack import stack_parameters as stack_parameters
from .stack import unstack_parameters as unstack_parameters

__all__ = ["stack_parameters", "unstack_parameters"]
