"""A slow oracle: it stores every pre-activation, seen at the dispatcher, and computes each column from all of them.

Nothing here uses the package under test. Calls are seen as aten operators, below autograd and below functions, and are
told apart by the order that a case of the zoo declares.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

aten = torch.ops.aten
_ALWAYS = {
    aten.relu.default,
    aten.relu_.default,
    aten.hardswish.default,
    aten.hardswish_.default,
    aten.leaky_relu.default,
    aten.leaky_relu_.default,
    aten.gelu.default,
    aten.threshold.default,
    aten.threshold_.default,
    aten.elu.default,
    aten.elu_.default,
    aten.silu.default,
    aten.silu_.default,
    aten.softplus.default,
    aten.mish.default,
}
_WITH_ZERO_EDGE = {
    aten.clamp.default,
    aten.clamp_.default,
    aten.clamp_min.default,
    aten.clamp_min_.default,
    aten.hardtanh.default,
    aten.hardtanh_.default,
}


class Recorder(TorchDispatchMode):
    """Keeps a copy of what every rectifier is applied to, in the order of the calls."""

    def __init__(self) -> None:
        super().__init__()
        self.pre: list[Tensor] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        rectifies = func in _ALWAYS or (func in _WITH_ZERO_EDGE and len(args) > 1 and args[1] == 0)
        if rectifies and args[0].is_floating_point():
            pre = args[0].detach()
            self.pre.append(pre.to_dense() if pre.is_mkldnn else pre.clone())
        return func(*args, **(kwargs or {}))


def pre_activations(run: Callable[[], object]) -> list[Tensor]:
    """Every pre-activation of one forward, in the order of the calls."""
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)  # the fused kernel hides its rectifier from the dispatcher
    try:
        with torch.no_grad(), Recorder() as recorder:
            run()
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
    return recorder.pre


class Seen:
    """Every value that one site received: (inputs, units, positions) per forward, with the ordinals of its inputs."""

    def __init__(self) -> None:
        self.ordinals: list[np.ndarray[Any, Any]] = []
        self.values: list[np.ndarray[Any, Any]] = []

    def add(self, first_ordinal: int, calls: Sequence[Tensor]) -> None:
        """The calls of one forward; several calls on the same inputs add positions to them."""
        joined = torch.cat([call.double() for call in calls], dim=2).numpy()
        self.ordinals.append(np.arange(first_ordinal, first_ordinal + len(joined)))
        self.values.append(joined)

    def columns(
        self,
        fires: Callable[[Any], Any],
        post: Callable[[Any], Any],
        masks: Sequence[np.ndarray[Any, Any]] | None = None,
    ) -> dict[str, np.ndarray[Any, Any]]:
        """Each column of the evidence, from everything that was stored; padding positions are left out."""
        num_units = self.values[0].shape[1]
        columns: dict[str, list[Any]] = {}
        for unit in range(num_units):
            rows = [
                row[unit][mask] if mask is not None else row[unit]
                for index, values in enumerate(self.values)
                for row, mask in zip(values, masks[index] if masks else [None] * len(values), strict=True)
            ]
            ordinals = np.concatenate(self.ordinals)
            real = np.array([len(row) > 0 for row in rows])
            fired = np.array([bool(fires(row[np.isfinite(row)]).any()) for row in rows])
            flat = np.concatenate(rows)
            finite = flat[np.isfinite(flat)]
            measured = len(finite) > 0
            for name, value in {
                "inputs": int(real.sum()),
                "inputs_fired": int(fired.sum()),
                "positions": len(finite),
                "positions_fired": int(fires(finite).sum()),
                "non_finite_values": len(flat) - len(finite),
                "pre_max": finite.max() if measured else np.nan,
                "pre_min": finite.min() if measured else np.nan,
                "pre_mean": finite.mean() if measured else np.nan,
                "pre_std": finite.std() if measured else np.nan,
                "post_mean": np.abs(post(finite)).mean() if measured else np.nan,
                "first_fired": int(ordinals[fired].min()) if fired.any() else -1,
                "last_fired": int(ordinals[fired].max()) if fired.any() else -1,
            }.items():
                columns.setdefault(name, []).append(value)
        return {name: np.array(values) for name, values in columns.items()}


EXACT = ("inputs", "inputs_fired", "positions", "positions_fired", "non_finite_values", "pre_max", "pre_min",
         "first_fired", "last_fired")  # fmt: skip


def assert_columns_equal(found: Any, expected: dict[str, np.ndarray[Any, Any]], *, relative: float = 1e-6) -> None:
    """Counts and extremes agree exactly; means and spreads to ``relative`` of the values' own size."""
    for name in EXACT:
        np.testing.assert_array_equal(np.asarray(found[name]), expected[name], err_msg=name)
    size = np.abs(expected["pre_mean"]) + expected["pre_std"]
    np.testing.assert_array_less(np.abs(np.asarray(found["pre_mean"]) - expected["pre_mean"]), relative * size + 1e-30)
    rounding = 2.0**-22 * float(np.nanmax(np.abs(expected["pre_mean"]), initial=0))  # of values in float32
    np.testing.assert_allclose(np.asarray(found["pre_std"]), expected["pre_std"], rtol=relative, atol=rounding + 1e-12)
    np.testing.assert_allclose(np.asarray(found["post_mean"]), expected["post_mean"], rtol=10 * relative, atol=1e-9)
