"""Scripted modules: where they are, the weights frozen into their graphs, the attributes that their code writes."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch import Tensor, nn

from relu_doctor.observe.graph.names import strip_wrappers

Graph = Any  # torch._C.Graph, of which torch's stubs know little
Value = Any
Node = Any


def outermost_scripts(model: nn.Module) -> Iterator[tuple[str, torch.jit.ScriptModule]]:
    """The scripted modules that are not inside another one, with their paths."""
    inside: list[str] = []
    for name, module in model.named_modules():
        if isinstance(module, torch.jit.ScriptModule) and not any(name.startswith(outer) for outer in inside):
            inside.append(f"{name}." if name else "")
            yield strip_wrappers(f"{name}.")[:-1], module


def module_at(model: nn.Module, path: str) -> Any:
    """The module at a path; scripted modules have no ``get_submodule``.

    Raises:
        KeyError: there is none.
    """
    module: Any = model
    for part in path.split(".") if path else ():
        module = module._modules[part]
    return module


def holds_scripts(model: nn.Module) -> bool:
    """Whether scripted modules are inside a model, or scripted functions within its modules' reach."""
    return any(True for _ in outermost_scripts(model)) or any(True for _ in _functions(model))


def _functions(model: nn.Module) -> Iterator[Any]:
    """The scripted functions that are attributes of modules, or stand in the files that their classes come from."""
    files: set[str] = set()
    for module in model.modules():
        yield from (value for value in vars(module).values() if isinstance(value, torch.jit.ScriptFunction))
        files |= {cls.__module__ for cls in type(module).__mro__}
    for name in files:
        if name in sys.modules and name.split(".")[0] not in {"torch", "builtins"}:
            held = list(vars(sys.modules[name]).values())
            yield from (value for value in held if isinstance(value, torch.jit.ScriptFunction))


def compile_scripts(model: nn.Module) -> None:
    """Let TorchScript make the graphs that it optimises and keeps, before any of its code runs unoptimised.

    A method keeps the graph that it had when it was first needed; made while nothing is optimised, it would stay so.
    """
    for _, module in outermost_scripts(model):
        for name in module._c._method_names():
            graph = torch._C.Graph()
            owner = graph.addInput("self")
            owner.setType(module._c._type())
            values = [owner]
            for argument in module._c._get_method(name).schema.arguments[1:]:
                values.append(graph.addInput())
                values[-1].setType(argument.type)
            call = graph.create("prim::CallMethod", values, 1)
            call.s_("name", name)
            graph.appendNode(call)
            torch._C._jit_pass_inline(graph)  # which asks the method for that graph
    for function in _functions(model):
        with suppress(RuntimeError):  # it was not run yet, but it has that graph now
            function.get_debug_state()


@contextmanager
def unoptimized() -> Iterator[None]:
    """Let scripted code run operator by operator in this thread: neither fused nor hidden in a graph of its own."""
    with torch.jit.optimized_execution(False):  # type: ignore[attr-defined]
        yield


def frozen_weights(model: nn.Module) -> dict[str, Tensor]:
    """The floating tensors that freezing or tracing wrote into graphs as constants, by name.

    A name is the parameter's own where the file still has it; else it counts the operations that take such tensors.
    """
    found: dict[str, Tensor] = {}
    seen: set[int] = set()
    for path, module in outermost_scripts(model):
        counts: dict[str, int] = {}
        for graph in graphs_of(module):
            for name, tensor in _constants(graph, counts):
                if id(tensor) not in seen:
                    seen.add(id(tensor))
                    found[f"{path}.{name}" if path else name] = tensor
    return found


@contextmanager
def constants_require_gradients(weights: Iterable[Tensor]) -> Iterator[None]:
    """Let weights that are constants of a graph take part in autograd, for the length of a discovery."""
    frozen = [weight for weight in weights if not weight.requires_grad and not weight.is_inference()]
    try:
        for weight in frozen:
            weight.requires_grad_(True)
        yield
    finally:
        for weight in frozen:
            weight.requires_grad_(False)


def scripted_attributes(model: nn.Module) -> list[tuple[Any, str]]:
    """The attributes that scripted code reads or writes, but for parameters and buffers: their owners and names."""
    found: list[tuple[Any, str]] = []
    for _, root in outermost_scripts(model):
        modules: list[Any] = list(root.modules())
        graphs = [graph for module in modules for graph in graphs_of(module, inlined=False)]
        names = {"training": None}
        for kind in ("prim::GetAttr", "prim::SetAttr"):
            names.update((node.s("name"), None) for graph in graphs for node in graph.findAllNodes(kind))
        for module in modules:
            known = {*dict(module.named_parameters(recurse=False)), *dict(module.named_buffers(recurse=False))}
            known |= set(module._modules.keys())
            own = [name for name in names if name not in known and module._c.hasattr(name)]
            # The inside of an object is known to its own class only.
            found += [(module._c, n) for n in own if not isinstance(module._c.getattr(n), torch._C.ScriptObject)]
    return found


def graphs_of(module: Any, methods: tuple[str, ...] | None = None, *, inlined: bool = True) -> Iterator[Graph]:
    """The graphs of a scripted module's methods, with those of the methods that they call put in, or without."""
    for name in module._c._method_names() if methods is None else methods:
        method = module._c._get_method(name)
        yield method.inlined_graph if inlined else method.graph


def nodes_of(block: Any, conditional: bool = False) -> Iterator[tuple[Node, bool]]:
    """The nodes of a graph, those of branches and loops where they stand, and whether they are in one."""
    for node in block.nodes():
        for inner in node.blocks():
            yield from nodes_of(inner, True)
        yield node, conditional


def _constants(graph: Graph, counts: dict[str, int]) -> Iterator[tuple[str, Tensor]]:
    """Floating tensors in a graph that something takes as an operand, with a name for each."""
    for node, _ in nodes_of(graph):
        numbered = ""
        for position, value in enumerate(node.inputs()):
            tensor = constant_of(value)
            if tensor is None:
                continue
            name = value.debugName()
            if name.startswith("self."):
                if not _argument_name(node, position).startswith("running_"):  # statistics take no gradients
                    yield name.removeprefix("self."), tensor
                continue
            operation = node.kind().partition("::")[2]
            if not numbered:
                counts[operation] = counts.get(operation, 0) + 1
                numbered = f"{operation}_{counts[operation]}"
            argument = _argument_name(node, position)
            if not argument.startswith("running_"):
                yield f"{numbered}.{argument}", tensor


def constant_of(value: Value) -> Tensor | None:
    """The floating tensor with axes that a value of a graph is; ``None`` for anything else."""
    node = value.node()
    if node.kind() != "prim::Constant" or not node.hasAttribute("value") or node.kindOf("value") != "t":
        return None
    tensor: Tensor = node.t("value")
    return tensor if tensor.is_floating_point() and tensor.dim() and not tensor.is_mkldnn else None


def _argument_name(node: Node, position: int) -> str:
    schema = node.schema()
    if "(" not in schema or schema.startswith("("):
        return str(position)
    arguments = torch._C.parse_schema(schema).arguments
    return str(arguments[position].name) if position < len(arguments) else str(position)
