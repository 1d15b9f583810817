"""The errors a user meets, and the refusal a pass raises."""

from __future__ import annotations

from torch.fx import Node


class OptionError(ValueError):
    """An option has a wrong name, type or value. The message says which, and what is allowed."""


class ModelError(ValueError):
    """A model, a loss or a batch cannot be used as it was given. The message says why."""


class CannotRewrite(Exception):
    """A chain is left exact. Raised by a pass, caught once by the pipeline, which logs and reports it.

    Args:
        reason: one clause that says what is in the way.
        node: where, if one node is to blame.
    """

    def __init__(self, reason: str, node: Node | None = None) -> None:
        super().__init__(reason)
        self.reason = reason
        self.node = node
