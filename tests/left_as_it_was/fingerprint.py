"""A fingerprint of everything that a scan could leave behind: of a model, and of the process that it runs in."""

from __future__ import annotations

import pickle
import random
import sys
import threading
import warnings
from collections import OrderedDict, deque
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.overrides import _get_current_function_mode_stack
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

HOOKS = [name for name in vars(nn.Module()) if "hook" in name]
GLOBAL_HOOKS = [
    name for name in vars(torch.nn.modules.module) if name.startswith("_global_") and name.endswith("hooks")
]
_BACKENDS = {
    "cudnn": ("enabled", "benchmark", "deterministic", "allow_tf32"),
    "mkldnn": ("enabled", "deterministic"),
    "mkldnn.matmul": ("fp32_precision",),
    "opt_einsum": ("enabled", "strategy"),
    "cuda.matmul": ("allow_tf32", "allow_fp16_reduced_precision_reduction", "allow_bf16_reduced_precision_reduction"),
}


def fingerprint(model: nn.Module) -> dict[str, Any]:
    """Bytes for values, identities for objects, order for what is in dictionaries."""
    return {**of_model(model), **of_process()}


def of_model(model: nn.Module) -> dict[str, Any]:
    """What a scan could change of a model."""
    modules = dict(model.named_modules(remove_duplicate=False))
    parameters = dict(model.named_parameters(remove_duplicate=False))
    return {
        "classes": {name: type(module) for name, module in modules.items()},
        "training flags": {name: module.training for name, module in modules.items()},
        "attributes": {
            name: [(key, _held(value)) for key, value in vars(module).items() if key != "training"]
            for name, module in modules.items()
        },
        "hooks": {(name, hook): _held(getattr(module, hook)) for name, module in modules.items() for hook in HOOKS},
        "parameters": {name: (*_tensor(p), p.requires_grad, p.is_leaf) for name, p in parameters.items()},
        "gradients": {name: None if p.grad is None else _tensor(p.grad) for name, p in parameters.items()},
        "versions": {name: p._version for name, p in parameters.items() if not p.is_inference()},
        "hooks of parameters": {
            name: (_held(p._backward_hooks), _held(p._post_accumulate_grad_hooks)) for name, p in parameters.items()
        },
        "buffers": {
            (name, key): None if buffer is None else (*_tensor(buffer), buffer.requires_grad, buffer.grad_fn)
            for name, module in modules.items()
            for key, buffer in module._buffers.items()
        },
        "tensors": {
            (name, key): (*_tensor(value), value.requires_grad, id(value.grad_fn))
            for name, module in modules.items()
            for key, value in vars(module).items()
            if isinstance(value, Tensor)
        },
    }


def of_process() -> dict[str, Any]:
    """What a scan could change of the process: random states, modes, flags, threads."""
    backends = {
        (name, flag): getattr(_submodule(torch.backends, name), flag)
        for name, flags in _BACKENDS.items()
        for flag in flags
        if hasattr(_submodule(torch.backends, name), flag)
    }
    return {
        "global hooks": [_held(getattr(torch.nn.modules.module, name)) for name in GLOBAL_HOOKS],
        "torch random": torch.get_rng_state().numpy().tobytes(),
        "cuda random": [state.numpy().tobytes() for state in torch.cuda.get_rng_state_all()]
        if torch.cuda.is_initialized()
        else None,
        "numpy random": pickle.dumps(np.random.get_state()),  # noqa: NPY002 the user's global state
        "python random": random.getstate(),
        "gradient mode": torch.is_grad_enabled(),
        "inference mode": torch.is_inference_mode_enabled(),
        "autocast": [(torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)) for kind in ("cpu", "cuda")],
        "autocast cache": torch.is_autocast_cache_enabled(),
        "function modes": [id(mode) for mode in _get_current_function_mode_stack()],
        "dispatch modes": [id(mode) for mode in _get_current_dispatch_mode_stack()],
        "torch functions": (torch._C._is_torch_function_enabled(), torch._C._is_torch_function_all_disabled()),
        "saved tensor hooks": torch._C._autograd._top_saved_tensors_default_hooks(True),
        "transforms": torch._C._functorch.peek_interpreter_stack(),
        "deterministic": (
            torch.are_deterministic_algorithms_enabled(),
            torch.is_deterministic_algorithms_warn_only_enabled(),
            torch.utils.deterministic.fill_uninitialized_memory,
        ),
        "anomaly mode": (torch.is_anomaly_enabled(), torch.is_anomaly_check_nan_enabled()),
        "multithreading": torch._C._is_multithreading_enabled(),
        "default dtype": torch.get_default_dtype(),
        "default device": torch.get_default_device(),
        "backends": backends,
        "attention": (
            torch.backends.mha.get_fastpath_enabled(),
            torch.backends.cuda.flash_sdp_enabled(),
            torch.backends.cuda.mem_efficient_sdp_enabled(),
            torch.backends.cuda.math_sdp_enabled(),
        ),
        "matmul precision": torch.get_float32_matmul_precision(),
        "scripted code": torch._C._get_graph_executor_optimize(),
        "compiler stance": _stance(),
        "threads": (torch.get_num_threads(), torch.get_num_interop_threads()),
        "own threads": {t for t in threading.enumerate() if not t.name.startswith("relu_doctor-")},
        "warnings": [
            entry for entry in warnings.filters if not entry[2].__module__.startswith("scipy.")
        ],  # its import's
        "flushes denormals": float(torch.tensor(1e-40, device="cpu") * 1.0) == 0.0,
    }


def assert_same(before: dict[str, Any], after: dict[str, Any]) -> None:
    """Every part of two fingerprints is alike; the first that is not is named."""
    for name, value in before.items():
        if after[name] != value:
            raise AssertionError(f"{name} changed{_where(value, after[name])}")


def _where(before: object, after: object, place: str = "") -> str:
    """Where two nests differ, and how."""
    if isinstance(before, dict) and isinstance(after, dict):
        for key in {**before, **after}:
            if before.get(key, _where) != after.get(key, _where):
                return _where(before.get(key), after.get(key), f"{place} at {key}")
    if isinstance(before, tuple | list) and isinstance(after, tuple | list) and len(before) == len(after):
        for index, (one, other) in enumerate(zip(before, after, strict=True)):
            if one != other:
                return _where(one, other, f"{place}, {index}")
    return f"{place}: {str(before)[:300]} -> {str(after)[:300]}"


def _held(value: object) -> object:
    """An object by its identity, and what is in a container of Python's own."""
    if isinstance(value, dict | OrderedDict):
        return id(value), [(key, id(item)) for key, item in value.items()]
    if isinstance(value, list | deque):
        return id(value), [id(item) for item in value]
    if isinstance(value, int | float | str | bool) or value is None:
        return value
    return id(value)


def _tensor(tensor: Tensor) -> tuple[Any, ...]:
    plain = tensor.detach()
    values = plain.clone(memory_format=torch.contiguous_format).reshape(-1)
    return (
        id(tensor),
        plain.dtype,
        plain.shape,
        plain.stride(),
        plain.data_ptr(),
        values.view(torch.uint8).numpy().tobytes() if values.numel() else b"",
    )


def _stance() -> object:
    dynamo = sys.modules.get("torch._dynamo.eval_frame")
    return None if dynamo is None else dynamo._stance


def _submodule(module: Any, path: str) -> Any:
    for name in path.split("."):
        module = getattr(module, name, None)
    return module
