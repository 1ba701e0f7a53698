"""Where scripted code applies rectifiers: read off its graphs, since it keeps no module path while it runs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from relu_doctor.observe.models.scripted import constant_of, frozen_weights, graphs_of, nodes_of, outermost_scripts
from relu_doctor.observe.rectifiers.kinds import MODULES

_RECTIFIERS = frozenset(cls.__name__ for cls in MODULES)
_KINDS = frozenset(
    {"relu", "clamp", "clamp_min", "threshold", "hardtanh", "hardswish", "leaky_relu", "prelu", "elu", "celu", "gelu"}
    | {"silu", "mish", "softplus", "maximum", "where", "mul", "masked_fill", "topk"}
)
_SAME_KIND = {"relu6": "hardtanh", "selu": "elu", "rrelu": "leaky_relu", "clip": "clamp"}  # below functions
_WRITTEN_OUT = frozenset({"maximum", "where", "mul", "masked_fill"})  # these rectify only in the light of an operand
_OPERANDS = frozenset(
    {"aten::gt", "aten::ge", "aten::lt", "aten::le", "aten::zeros", "aten::zeros_like", "aten::to", "aten::type_as"}
    | {"prim::Constant"}
)
_AXIS = {"linear": -1, "matmul": -1, "mm": -1, "addmm": -1}  # of the units of an operation's output
_CHANNELS_SECOND = frozenset({"batch_norm", "instance_norm", "group_norm"})
_TENSORS = frozenset({"TensorType", "ListType", "TupleType", "OptionalType"})
_CROSSINGS = 8  # rectifiers in a row that are looked through


@dataclass(frozen=True, slots=True)
class Place:
    """Where scripted code applies something that may rectify.

    Attributes:
        script: path of the outermost scripted module that it is in.
        path: of the module whose code it is.
        cls: that module's class, where it is a rectifier module; empty for a function in other code.
        kind: the operator, as aten calls it.
        weights: qualified names of the parameters nearest before it.
        crossed: how many rectifiers lie between.
        axis: of its units, where the operation before it tells; ``None`` where nothing does.
        conditional: it stands in a branch or a loop.
    """

    script: str
    path: str
    cls: str
    kind: str
    weights: frozenset[str]
    crossed: int
    axis: int | None
    conditional: bool


class ScriptedCode:
    """What is known of a model's scripted code before it runs.

    Args:
        model: with scripted modules in it, or without.

    Attributes:
        weights: the tensors that freezing wrote into graphs, by name.
        places: where something may rectify.
        unplaced: a call was seen that could not be told to be of any one place.
    """

    def __init__(self, model: nn.Module) -> None:
        self.weights: dict[str, Tensor] = frozen_weights(model)
        self.places = rectifier_places(model)
        self.unplaced = False
        self._model = model
        self._reached: set[str] = set()
        # Where no parameter tells, the order of calls does, if nothing but the scripted code decides it.
        self._steps: dict[str, list[Place]] = {}
        for place in rectifier_places(model, ("forward",)):
            self._steps.setdefault(place.script, []).append(place)

    def locate(self, kind: str, nearest: Iterable[str], crossed: int, script: str | None, index: int) -> Place | None:
        """The place that a call is at.

        Args:
            kind: of rectifier, as torch calls the function.
            nearest: the parameters nearest before it.
            crossed: how many rectifiers lie between.
            script: path of the scripted module whose forward is running; ``None`` where that is not known.
            index: which call of that forward it is.

        Returns:
            ``None`` where no one place fits.
        """
        wanted, kind = frozenset(nearest), _SAME_KIND.get(kind, kind)
        alike = [place for place in self.places if place.kind == kind and script in {None, place.script}]
        fitting = [place for place in alike if place.crossed == crossed and place.weights & wanted]
        closest = max((_likeness(place.weights, wanted) for place in fitting), default=0.0)
        best = [place for place in fitting if _likeness(place.weights, wanted) == closest]
        if not best and script is not None:
            steps = self._steps.get(script, [])
            straight = index < len(steps) and not any(place.conditional for place in steps)
            best = [steps[index]] if straight and steps[index].kind == kind else alike
        if len({(place.path, place.cls) for place in best}) != 1:
            self.unplaced = True
            return None
        self._reached.add(best[0].path)
        return best[0]

    def unreached(self) -> list[tuple[str, nn.Module]]:
        """Scripted rectifier modules that no call was seen of; none where it is not known whose the calls were."""
        if self.unplaced:
            return []
        return [
            (found, child)
            for path, module in outermost_scripts(self._model)
            for name, child in module.named_modules()
            if child.original_name in _RECTIFIERS and (found := _joined(path, name)) not in self._reached
        ]


def rectifier_places(model: nn.Module, methods: tuple[str, ...] | None = None) -> list[Place]:
    """Every place where scripted code applies something that may rectify, in the order of the code.

    Args:
        model: with scripted modules in it.
        methods: of those modules, to read; all of them by default.
    """
    places: list[Place] = []
    for path, module in outermost_scripts(model):
        frozen = frozen_weights(module)
        modules = [name for name, _ in module.named_modules()] + _owners(_left_over(module))
        parameters = frozenset(name for name, _ in module.named_parameters(remove_duplicate=False))
        reader = _Reader(parameters, {id(value): name for name, value in frozen.items()})
        for graph in graphs_of(module, methods):
            for node, conditional in nodes_of(graph):
                if not _may_rectify(node):
                    continue
                weights, crossed, axis = reader.before(node)
                own, cls = _owner(node, modules, weights)
                cls = cls if own else getattr(module, "original_name", "")
                named = frozenset(_joined(path, weight) for weight in weights)
                cls = cls if cls in _RECTIFIERS else ""
                places.append(Place(path, _joined(path, own), cls, _kind(node), named, crossed, axis, conditional))
    return places


def _likeness(one: frozenset[str], other: frozenset[str]) -> float:
    return len(one & other) / len(one | other)


def _kind(node: Any) -> str:
    """``relu`` of ``aten::relu_``."""
    namespace, _, name = node.kind().partition("::")
    name = name.rstrip("_")
    return _SAME_KIND.get(name, name) if namespace == "aten" else ""


def _may_rectify(node: Any) -> bool:
    kind = _kind(node)
    if kind not in _WRITTEN_OUT:
        return kind in _KINDS
    return any(value.node().kind() in _OPERANDS for value in node.inputs() if value.type().kind() == "TensorType")


def _joined(path: str, name: str) -> str:
    return f"{path}.{name}" if path and name else path or name


def _left_over(module: Any) -> set[str]:
    """The names that the values of graphs still have from attributes of modules which freezing has removed."""
    nodes = [node for graph in graphs_of(module) for node, _ in nodes_of(graph)]
    names = {value.debugName() for node in nodes for value in node.outputs()}
    return {name.removeprefix("self.") for name in names if name.startswith("self.")}


def _owners(names: Iterable[str]) -> list[str]:
    """The modules that own attributes of these names, and those that these are in."""
    found: dict[str, None] = {}
    for name in names:
        while "." in name:
            name = name.rpartition(".")[0]
            found[name] = None
    return list(found)


def _owner(node: Any, modules: list[str], weights: set[str]) -> tuple[str, str]:
    """Path of the module whose code a node is, and its class; empty for the root.

    Containers that the code only iterates over are put back in, where the modules are known.
    """
    tokens = [part.rstrip(")").partition("(") for part in node.getModuleHierarchy().split(".") if part]
    tokens = [(name, bracket, cls) for name, bracket, cls in tokens if name not in {"SELF", "UNKNOWN_INSTANCE"}]
    parts, cls = [name for name, _, _ in tokens], tokens[-1][2] if tokens else ""
    near = next(iter(sorted(weights)), "").split(".")
    return ".".join(_full(parts, modules, near)), cls


def _full(parts: list[str], modules: list[str], near: list[str]) -> list[str]:
    """The path of the module that a node's hierarchy tells, which leaves containers out.

    Of the modules whose paths hold all the parts it is the one of the shortest, and then the nearest to where the
    weights are; where there is none, the last part stands in the module that the parts before it tell.
    """
    if not parts or ".".join(parts) in modules:
        return parts
    paths = [path for name in modules if (path := name.split("."))[-1] == parts[-1] and _holds(path, parts)]
    ranks = [(len(path), -_shared(path, near)) for path in paths]
    if not paths or ranks.count(min(ranks)) > 1:
        return [*_full(parts[:-1], modules, near), parts[-1]]
    return paths[ranks.index(min(ranks))]


def _shared(path: list[str], near: list[str]) -> int:
    """How many parts two paths begin with alike."""
    return next(
        (count for count, (a, b) in enumerate(zip(path, near, strict=False)) if a != b), min(len(path), len(near))
    )


def _holds(path: list[str], parts: list[str]) -> bool:
    """Whether all parts stand in a path, in their order."""
    rest = iter(path)
    return all(part in rest for part in parts)


def _tensors(values: Iterable[Any]) -> list[Any]:
    return [value for value in values if value.type().kind() in _TENSORS]


class _Reader:
    """Walks back through a graph from a rectifier to the parameters nearest before it."""

    def __init__(self, parameters: frozenset[str], constants: Mapping[int, str]) -> None:
        self.parameters = parameters
        self.constants = constants

    def before(self, node: Any) -> tuple[set[str], int, int | None]:
        """The parameters, how many rectifiers lie between, and the axis of the units.

        The axis is told where one operation takes all the parameters.
        """
        for crossed in range(_CROSSINGS):
            weights, axes, blocked = self._walk(node, crossed)
            if weights or axes or not blocked:
                return weights, crossed, axes.pop() if len(axes) == 1 else None
        return set(), 0, None

    def _walk(self, start: Any, crossings: int) -> tuple[set[str], set[int | None], bool]:
        weights: set[str] = set()
        axes: set[int | None] = set()
        blocked = False
        seen: set[str] = set()
        stack = [(value, crossings) for value in _tensors(start.inputs())]
        while stack:
            value, left = stack.pop()
            if value.debugName() in seen:
                continue
            seen.add(value.debugName())
            origin = value.node()
            own = [name for entry in origin.inputs() if (name := self._name(entry)) is not None]
            name = origin.kind().partition("::")[2]
            if (own and name != "prelu") or "conv" in name:
                weights |= set(own)
                axes.add(1 if "conv" in name or name in _CHANNELS_SECOND else _AXIS.get(name))
                continue
            if _may_rectify(origin):
                blocked |= not left
                left -= 1
            if left < 0:
                continue
            stack += [(entry, left) for entry in _tensors(origin.inputs())]
            stack += [(entry, left) for block in origin.blocks() for entry in _tensors(block.outputs())]
        return weights, axes, blocked

    def _name(self, value: Any) -> str | None:
        """The parameter, or the constant, that a value is."""
        tensor = constant_of(value)
        if tensor is not None:
            return self.constants.get(id(tensor))
        parts: list[str] = []
        while value.node().kind() == "prim::GetAttr":
            parts.append(value.node().s("name"))
            value = value.node().input()
        name = ".".join(reversed(parts))
        return name if name in self.parameters else None
