"""The names that a checkpoint may use, each with our own way to make its value. No name here is ever imported.

A constructor gets the arguments as the file gives them. It returns a plain value or a node, or raises
:class:`NotPlainError` to have a placeholder put there.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from relu_doctor.checkpoints.nodes import (
    ArrayNode,
    DamagedPickleError,
    Global,
    NumpyDtype,
    OrderedItems,
    Placeholder,
    StorageRef,
    StorageType,
    TensorRef,
    as_key,
    make_tensor,
)


class NotPlainError(Exception):
    """The arguments are not the plain ones that a constructor knows."""


Constructor = Callable[..., object]

_STORAGES: dict[str, torch.dtype | None] = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
    "ComplexFloatStorage": torch.complex64,
    "ComplexDoubleStorage": torch.complex128,
    "UntypedStorage": None,
    "_UntypedStorage": None,
}
_QUANTIZED = {"QUInt8Storage": 1, "QInt8Storage": 1, "QInt32Storage": 4, "QUInt4x2Storage": 1, "QUInt2x4Storage": 1}
_DTYPE_NAMES = (
    "float64 double float32 float half float16 bfloat16 int64 long int32 int int16 short int8 uint8 uint16 uint32 "
    "uint64 bool complex32 chalf complex64 cfloat complex128 cdouble float8_e4m3fn float8_e5m2 float8_e4m3fnuz "
    "float8_e5m2fnuz float8_e8m0fnu"
)
_DTYPES: dict[str, torch.dtype] = {
    name: dtype for name in _DTYPE_NAMES.split() if isinstance(dtype := getattr(torch, name, None), torch.dtype)
}
_OLD_MODULES = {"__builtin__": "builtins", "copy_reg": "copyreg", "torch.tensor": "torch._tensor"}


def resolve_global(module: str, name: str) -> object:
    """What a name in the file stands for: a dtype, a storage type, or a :class:`Global`."""
    module = _OLD_MODULES.get(module, module)
    if module.startswith("numpy._core."):  # numpy 2 renamed its package, the functions are the same
        module = "numpy.core." + module.removeprefix("numpy._core.")
    if module == "torch" and name in _DTYPES:
        return _DTYPES[name]
    if module in ("torch", "torch.cuda", "torch.storage"):
        if name in _STORAGES:
            dtype = _STORAGES[name]
            return StorageType(name, dtype, 1 if dtype is None else dtype.itemsize)
        if name in _QUANTIZED:
            return StorageType(name, None, -_QUANTIZED[name])
    return Global(module, name)


def find_constructor(target: Global) -> Constructor | None:
    """Our own constructor for a name, or ``None`` where a placeholder has to stand for it."""
    return _CONSTRUCTORS.get(target.dotted)


def _only(args: tuple[Any, ...], kind: type | tuple[type, ...]) -> Any:
    if len(args) != 1 or not isinstance(args[0], kind):
        raise NotPlainError
    return args[0]


def _number_or_text(kind: Callable[..., object]) -> Constructor:
    def make(*args: Any) -> object:
        if args and (len(args) > 1 or type(args[0]) not in (int, float, str, bool) or len(str(args[0])) > 1000):
            raise NotPlainError
        return kind(*args)

    return make


def _complex(*args: Any) -> complex:
    if len(args) > 2 or not all(type(part) in (int, float) for part in args):
        raise NotPlainError
    return complex(*args)


def _collection(kind: Callable[..., object]) -> Constructor:
    def make(*args: Any) -> object:
        elements = _only(args, (list, tuple, set, frozenset)) if args else ()
        return kind(as_key(element) for element in elements)

    return make


def _sequence(kind: Callable[..., object]) -> Constructor:
    def make(*args: Any) -> object:
        return kind(_only(args, (list, tuple)) if args else ())

    return make


def _items(*args: Any) -> OrderedItems:
    result = OrderedItems()
    if args:
        given = _only(args, (dict, list, tuple))
        pairs = given.items() if isinstance(given, dict) else given
        for pair in pairs:
            if not isinstance(pair, tuple | list) or len(pair) != 2:
                raise NotPlainError
            result[as_key(pair[0])] = pair[1]
    return result


def _default_items(*args: Any) -> OrderedItems:
    return _items(*args[1:])


def _bytes(*args: Any) -> bytes:
    return bytes(_only(args, (bytes, bytearray))) if args else b""


def _bytearray(*args: Any) -> bytearray:
    if len(args) == 2 and isinstance(args[0], str) and args[1] in ("latin-1", "latin1"):
        return bytearray(args[0], "latin-1")
    return bytearray(_only(args, (bytes, bytearray)) if args else b"")


def _encode(*args: Any) -> bytes:
    if not 1 <= len(args) <= 2 or not isinstance(args[0], str):
        raise NotPlainError
    if args[1:] not in ((), ("latin1",), ("latin-1",), ("utf-8",), ("ascii",)):
        raise NotPlainError
    return args[0].encode(args[1] if len(args) == 2 else "utf-8")


def _reconstructor(cls: Any, base: Any, state: Any) -> object:
    placeholder = Placeholder(cls.dotted if isinstance(cls, Global) else "copyreg._reconstructor", (base, state))
    if isinstance(state, dict):
        placeholder.items = state  # shared, not copied
    return placeholder


def _device(*args: Any) -> str:
    return ":".join(str(part) for part in args if isinstance(part, str | int))


def _layout(*args: Any) -> str:
    return str(_only(args, str))


def _tensor(storage: object, offset: object, shape: object, stride: object, *ignored: object) -> object:
    metadata = ignored[2] if len(ignored) > 2 else None  # after requires_grad and the hooks
    if isinstance(metadata, dict) and any(metadata.values()):
        raise NotPlainError  # a lazily conjugated or negated view
    return make_tensor(storage, offset, shape, stride, None)


def _tensor_v3(
    storage: object,
    offset: object,
    shape: object,
    stride: object,
    grad: object,
    hooks: object,
    dtype: object,
    *rest: object,
) -> object:
    if not isinstance(dtype, torch.dtype) or (rest and isinstance(rest[0], dict) and any(rest[0].values())):
        raise NotPlainError
    if isinstance(storage, StorageRef) and storage.dtype not in (None, dtype):
        raise DamagedPickleError("a tensor's type is not that of its data")
    return make_tensor(storage, offset, shape, stride, dtype)


def _parameter(data: object, *ignored: object) -> object:
    if not isinstance(data, TensorRef | Placeholder | ArrayNode):
        raise NotPlainError
    return data


def _from_type(function: object, new_type: object, args: object, state: object) -> object:
    """A tensor of a subclass: its numbers are those of the plain tensor that it was made from."""
    if not isinstance(function, Global) or not isinstance(args, tuple) or function.dotted not in _PLAIN_TENSORS:
        raise NotPlainError
    return _CONSTRUCTORS[function.dotted](*args)


def _numpy_dtype(*args: Any) -> NumpyDtype:
    if not args or not isinstance(args[0], str):
        raise NotPlainError
    code = args[0]
    return NumpyDtype(code[1:], code[0]) if code[:1] in "<>=|" and code else NumpyDtype(code)


def _numpy_scalar(*args: Any) -> object:
    if len(args) != 2 or not isinstance(args[0], NumpyDtype) or not isinstance(args[1], bytes):
        raise NotPlainError
    dtype = args[0].resolve()
    if dtype is None or dtype.itemsize != len(args[1]):
        raise NotPlainError
    value: object = np.frombuffer(args[1], dtype)[0].item()
    return value


def _numpy_empty(*args: Any) -> ArrayNode:
    if len(args) != 3 or args[0] != Global("numpy", "ndarray"):
        raise NotPlainError
    return ArrayNode()


def _numpy_from_buffer(*args: Any) -> ArrayNode:
    if len(args) != 4:
        raise NotPlainError
    array = ArrayNode()
    set_array_state(array, (1, args[2], args[1], args[3] == "F", args[0]))
    return array


def set_array_state(array: ArrayNode, state: object) -> None:
    """Fill an array from the state that numpy pickles: (version, shape, dtype, column major, bytes).

    Raises:
        DamagedPickleError: the state is not of that form.
    """
    if not isinstance(state, tuple) or len(state) not in (4, 5):
        raise DamagedPickleError("a numpy array's state is malformed")
    shape, dtype, column_major, data = state[-4:]
    if not isinstance(shape, tuple) or not all(type(extent) is int for extent in shape):
        raise DamagedPickleError("a numpy array's shape is malformed")
    array.shape, array.column_major = shape, bool(column_major)
    array.dtype = dtype if isinstance(dtype, NumpyDtype) else None  # an array of objects has a list for its data
    array.data = data if isinstance(data, bytes | bytearray) else b""


def set_dtype_state(dtype: NumpyDtype, state: object) -> None:
    """Take the byte order from a dtype's pickled state; a structured dtype becomes one that is not read."""
    if isinstance(state, tuple) and len(state) >= 5 and isinstance(state[1], str):
        dtype.order = state[1]
        if any(part is not None for part in state[2:5]):
            dtype.code = "V"


_PLAIN_TENSORS = frozenset(
    f"torch._utils.{name}"
    for name in ("_rebuild_tensor", "_rebuild_tensor_v2", "_rebuild_tensor_v3", "_rebuild_parameter")
)
_CONSTRUCTORS: dict[str, Constructor] = {
    "collections.OrderedDict": _items,
    "collections.Counter": _items,
    "collections.defaultdict": _default_items,
    "builtins.dict": _items,
    "builtins.set": _collection(set),
    "builtins.frozenset": _collection(frozenset),
    "builtins.list": _sequence(list),
    "builtins.tuple": _sequence(tuple),
    "builtins.bytes": _bytes,
    "builtins.bytearray": _bytearray,
    "builtins.complex": _complex,
    "builtins.int": _number_or_text(int),
    "builtins.float": _number_or_text(float),
    "builtins.bool": _number_or_text(bool),
    "builtins.str": _number_or_text(str),
    "_codecs.encode": _encode,
    "copyreg._reconstructor": _reconstructor,
    "torch.Size": _sequence(tuple),
    "torch.device": _device,
    "torch.serialization._get_layout": _layout,
    "torch._utils._rebuild_tensor": _tensor,
    "torch._utils._rebuild_tensor_v2": _tensor,
    "torch._utils._rebuild_tensor_v3": _tensor_v3,
    "torch._utils._rebuild_parameter": _parameter,
    "torch._utils._rebuild_parameter_with_state": _parameter,
    "torch._utils._rebuild_device_tensor_from_cpu_tensor": _parameter,
    "torch._utils._rebuild_device_tensor_from_numpy": _parameter,
    "torch._utils._rebuild_xla_tensor": _parameter,
    "torch._tensor._rebuild_from_type_v2": _from_type,
    "numpy.dtype": _numpy_dtype,
    "numpy.core.multiarray.scalar": _numpy_scalar,
    "numpy.core.multiarray._reconstruct": _numpy_empty,
    "numpy.core.numeric._frombuffer": _numpy_from_buffer,
}
KNOWN_CLASSES = frozenset(
    itertools.chain(_CONSTRUCTORS, ("numpy.ndarray", "torch.Tensor", "torch.nn.parameter.Parameter"))
)
