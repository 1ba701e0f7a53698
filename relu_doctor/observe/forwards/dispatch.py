"""Calls below functions: aten operators that scripted code, a kernel, or ``torch.ops.aten.relu`` applies.

No function mode sees the inside of TorchScript, and what it sees of an exported program are operators, not functions.
Both are handed to the mode that watches functions as if the function of the same name had been called. A mode of the
dispatcher costs more per call, so it is entered where it is needed: for a discovery, and where one found calls that
nothing else shows.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import Any, Protocol, Self

import torch
from torch import Tensor
from torch._ops import HigherOrderOperator, OpOverload, OpOverloadPacket
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode, _pop_mode, _push_mode

from relu_doctor.observe.rectifiers.kinds import recognise

OPERATORS = (OpOverload, OpOverloadPacket, HigherOrderOperator)

# Operators that exist only below functions, and the function that each is.
_ALIASES = {
    "_prelu_kernel": "prelu",
    "rrelu_with_noise": "rrelu",
    "rrelu_with_noise_": "rrelu_",
    "_unsafe_view": "view",
    "alias": "view",
    "_to_copy": "to",
}
# Operators that rectify inside: what is rectified never is a tensor of its own.
_HIDING = ("relu", "conv2d_clamp_run", "linear_clamp_run", "_addmm_activation", "_transformer_encoder_layer_fwd")
_OPEN = frozenset({"relu", "relu6", "leaky_relu", "prelu", "_prelu_kernel", "rrelu", "rrelu_with_noise"})
_TORCHS_OWN = frozenset(
    {"aten", "prim", "prims", "quantized", "_quantized", "onednn", "mkldnn", "mkldnn_prepacked", "prepacked"}
)
_RECURRENT = {"aten::_cudnn_rnn": 6, "aten::miopen_rnn": 6}  # fused layers, and where their mode stands; 0 is ReLU


class Watching(Protocol):
    """What a mode of functions must offer for operators to be handed to it.

    Attributes:
        below: the call that is handed over was seen here.
        foreign: how many operators that are not torch's own are running.
        num_calls: rectifiers seen so far.
    """

    below: bool
    foreign: int
    num_calls: int

    @property
    def is_blind(self) -> bool:
        """Whether it does not look at calls now."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Take in one call."""

    def settle(self) -> None:
        """Read what was not to be had while the operator before was running."""

    def hidden(self, name: str) -> None:
        """An operator rectifies inside, where nothing is seen."""


class Stand:
    """An operator that passes for the torch function of the same name: it is found where that function is.

    Args:
        function: that it stands for.
        operator: that is performed.
    """

    __slots__ = ("__name__", "function", "operator")

    def __init__(self, function: Callable[..., Any], operator: Any) -> None:
        self.function, self.operator = function, operator
        self.__name__ = getattr(function, "__name__", "")

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Perform the operator."""
        return self.operator(*args, **kwargs)

    def __hash__(self) -> int:
        return hash(self.function)

    def __eq__(self, other: object) -> bool:
        return other is self.function or (isinstance(other, Stand) and other.function is self.function)


@lru_cache(maxsize=1024)
def function_of(operator: OpOverload | OpOverloadPacket) -> Stand:
    """A stand-in that passes for the torch function of an operator's name; for the operator, where there is none."""
    namespace, _, name = _qualified(operator).partition("::")
    name = _ALIASES.get(name, name)
    owners = (torch, Tensor, F, torch._C._nn) if namespace == "aten" else ()
    function = next((found for owner in owners if callable(found := getattr(owner, name, None))), operator)
    return Stand(function, operator)


def is_foreign(operator: OpOverload | OpOverloadPacket) -> bool:
    """Whether an operator is somebody's own: what is called inside is not known by its name."""
    return _qualified(operator).partition("::")[0] not in _TORCHS_OWN


def _qualified(operator: OpOverload | OpOverloadPacket) -> str:
    return operator.name().partition(".")[0] if isinstance(operator, OpOverload) else operator._qualified_op_name


def _hides(operator: OpOverload, args: tuple[Any, ...]) -> str:
    """The name of an operator that applies a rectifier inside, where it cannot be seen; empty for any other."""
    name = _qualified(operator)
    mode = _RECURRENT.get(name)
    if mode is not None:
        return name if len(args) > mode and args[mode] == 0 else ""
    own = name.partition("::")[2].rstrip("_")
    return name if own not in _OPEN and any(part in own for part in _HIDING) else ""


def perform_higher_order(operator: HigherOrderOperator, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """Perform an operator that calls functions, call by call.

    Returns:
        What it returns; ``NotImplemented`` where it is not known how it calls them.
    """
    if operator is torch.ops.higher_order.cond:
        wanted, on_true, on_false, *operands = (*args, *kwargs.values())
        return (on_true if wanted else on_false)(*(operands[0] if operands else ()))
    if operator.name() == "wrap_with_set_grad_enabled":
        enabled, function, *operands = args
        with torch.set_grad_enabled(enabled):
            return function(*operands, **kwargs)
    if operator.name() == "wrap_with_autocast":
        device, dtype, enabled, cache, function, *operands = args
        with torch.autocast(device, dtype=dtype, enabled=enabled, cache_enabled=cache):
            return function(*operands, **kwargs)
    return NotImplemented


class _QuietMode(TorchDispatchMode):
    """A mode that neither loads the compiler nor tells it anything.

    torch wraps a mode so that its first call loads all of the compiler, which takes seconds; and it notes in a variable
    of the whole process that a mode is active, which two threads that come and go leave wrong.
    """

    supports_higher_order_operators = True  # which are passed on; their inside comes here by itself

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch does not annotate it

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False

    def __enter__(self) -> Self:
        _push_mode(self)
        return self

    def __exit__(self, *_: object) -> None:
        _pop_mode()


class OperatorMode(_QuietMode):
    """Hands aten operators that no function mode saw to the mode that watches functions.

    Args:
        mode: entered before this one, in the same thread.
        opens: look into operators that are somebody's own, which takes a dispatch more.

    Attributes:
        num_calls: calls of rectifiers that were seen here alone.
        error: what the other mode raised; TorchScript turns that into an error of its own.
    """

    def __init__(self, mode: Watching, *, opens: bool) -> None:
        super().__init__()
        self.mode = mode
        self.opens = opens
        self.num_calls = 0
        self.error: Exception | None = None
        self._depth = 0

    def __enter__(self) -> Self:
        self._depth = torch._C._len_torch_function_stack()
        entered: Self = super().__enter__()
        return entered

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self.mode.is_blind or not isinstance(func, OpOverload):
            return func(*args, **kwargs)
        self.mode.settle()
        if self.opens and is_foreign(func):
            return self._open(func, args, kwargs)
        if torch._C._len_torch_function_stack() < self._depth and not self.mode.foreign:
            return func(*args, **kwargs)  # inside a function that the other mode is handling
        before, self.mode.below = self.mode.num_calls, True
        try:
            with torch._C.DisableTorchFunction():
                return self._hand_over(func, types, args, kwargs)
        except Exception as error:
            self.error = error
            raise
        finally:
            self.mode.below = False
            self.num_calls += self.mode.num_calls - before

    def _hand_over(self, operator: OpOverload, types: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        name = _hides(operator, args)
        if name:
            self.mode.hidden(name)
        stand = function_of(operator)
        if not any(isinstance(value, Tensor) and value.is_mkldnn for value in args):
            return self.mode.__torch_function__(stand, types, args, kwargs)
        stand = Stand(stand.function, lambda *_, **__: operator(*args, **kwargs))
        readable = tuple(value.to_dense() if isinstance(value, Tensor) and value.is_mkldnn else value for value in args)
        return self.mode.__torch_function__(stand, types, readable, kwargs)

    def _open(self, operator: OpOverload, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        with _Inside(operator) as inside:
            result = operator(*args, **kwargs)
        if inside.rectifies:
            self.mode.hidden(_qualified(operator))
        return result


class _Inside(_QuietMode):
    """Sees what an operator calls, where autograd does not follow.

    Args:
        operator: to look into.

    Attributes:
        rectifies: it applies a rectifier.
    """

    def __init__(self, operator: OpOverload) -> None:
        super().__init__()
        self.operator = operator
        self.rectifies = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is self.operator:
            device = next((value.device.type for value in args if isinstance(value, Tensor)), "cpu").upper()
            key = torch._C._parse_dispatch_key(device)
            if key is not None and torch._C._dispatch_has_computed_kernel_for_dispatch_key(func.name(), device):
                with self:
                    return func.redispatch(torch._C.DispatchKeySet(key), *args, **kwargs)
        elif isinstance(func, OpOverload):
            self.rectifies |= recognise(function_of(func), args, kwargs) is not None or bool(_hides(func, args))
        return func(*args, **kwargs)
