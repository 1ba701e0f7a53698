"""Effective rank: over how many directions a site's outputs spread (Roy and Vetterli 2007)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from relu_doctor.observe.forwards.outputs import OutputRows
from relu_doctor.observe.sites import ActivationSite


def effective_rank(outputs: Tensor) -> float:
    """The exponential of the entropy of the singular values, divided by their sum.

    Roy and Vetterli, *The effective rank: a measure of effective dimensionality*, EUSIPCO 2007. The singular values are
    the roots of the eigenvalues of the smaller Gram matrix, which takes a half to a ninth of the time; those below some
    1e-7 of the largest, as rounding in float32 makes them, are 0.

    Args:
        outputs: real (rows, units), on the CPU.

    Returns:
        Between 1 and the rank; 0 where all outputs are 0, and NaN where there are none or not all are finite.

    >>> import torch
    >>> round(effective_rank(torch.eye(3)), 4), effective_rank(torch.zeros(5, 3))
    (3.0, 0.0)
    """
    outputs = outputs.double()
    if not outputs.numel() or not bool(outputs.isfinite().all()):
        return float("nan")
    largest = outputs.abs().amax()
    if largest == 0:
        return 0.0
    scaled = outputs / largest
    short = scaled if len(scaled) <= scaled.shape[1] else scaled.T
    try:
        squares = torch.linalg.eigvalsh(short @ short.T)
    except RuntimeError:  # it did not converge
        return float("nan")
    rounding = squares[-1] * len(squares) * torch.finfo(squares.dtype).eps
    values = torch.where(squares > rounding, squares, 0).sqrt()
    return float(torch.special.entr(values / values.sum()).sum().exp())


def effective_ranks(sites: Iterable[ActivationSite], outputs: Mapping[str, OutputRows]) -> dict[str, float]:
    """The effective rank of each site of which outputs were had.

    Args:
        sites: those of them whose outputs go through a choice (a top-k, a mask) before they are read are left out:
            what is read of them was not seen.
        outputs: per ``site_id``.
    """
    return {
        site.site_id: effective_rank(outputs[site.site_id].values())
        for site in sites
        if site.site_id in outputs and not site.selected
    }
