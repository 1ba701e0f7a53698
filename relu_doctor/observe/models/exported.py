"""Exported programs: one flat list of operators, each of which remembers the module that it came from."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.fx import GraphModule

from relu_doctor.observe.rectifiers.kinds import MODULES

_RECTIFIERS = frozenset(cls.__name__ for cls in MODULES)


class Steps:
    """Follows the operators of a graph module while they run.

    Args:
        module: whose forward begins.
    """

    def __init__(self, module: nn.Module) -> None:
        nodes = module.graph.nodes if isinstance(module, GraphModule) else ()
        self._ahead = iter([node for node in nodes if node.op == "call_function"])

    def advance(self, operator: Any) -> tuple[str, str] | None:
        """Go on to where an operator is called.

        Returns:
            The path of the module that it came from, and that module's class where it is a rectifier's, else empty;
            ``None`` where the graph has no such call, or does not tell.
        """
        for node in self._ahead:
            if node.target is operator:
                stack = list(node.meta.get("nn_module_stack", {}).values())
                if not stack:
                    return None
                path, cls = stack[-1]
                name = (cls if isinstance(cls, str) else cls.__name__).rpartition(".")[2]
                return path, name if name in _RECTIFIERS else ""
        return None
