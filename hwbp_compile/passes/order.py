"""The order of a graph's nodes after some were added at its end."""

from __future__ import annotations

from torch.fx import Graph, Node


def sort_topologically(graph: Graph) -> None:
    """Have operands come before what reads them: those that do not are moved to just before it.

    All else keeps its order, so that no value has to be held longer than before for one that was added.

    Raises:
        ValueError: a value depends on itself.
    """
    placed: set[Node] = set()
    waiting: set[Node] = set()
    cursor: Node | None = None
    for root in list(graph.nodes):
        stack = [root]
        while stack:
            node = stack[-1]
            missing = [n for n in node.all_input_nodes if n not in placed]
            if missing and node not in placed:
                if node in waiting:
                    raise ValueError(f"{node} depends on itself.")
                waiting.add(node)
                stack.extend(reversed(missing))
                continue
            stack.pop()
            if node in placed:  # something else that was waiting for it came first
                continue
            placed.add(node)
            if cursor is not None and cursor.next is not node:
                cursor.append(node)
            cursor = node
