"""Colours of statuses: one set for every picture, told apart also by people who see fewer colours, and in grey.

After Okabe and Ito (2008); from light (alive) to dark (dead).
"""

from __future__ import annotations

from relu_doctor.terms import Status

STATUS_COLOURS = {
    Status.ACTIVE.value: "#d9e6ee",
    Status.DORMANT.value: "#9ec9e2",
    Status.RARE.value: "#56b4e9",
    Status.SATURATED.value: "#cc79a7",
    Status.UNPROVEN.value: "#f0a83c",
    Status.DEAD.value: "#b3321c",
    Status.NON_FINITE.value: "#1c1c1c",
    Status.UNOBSERVED.value: "#b8b8b8",
}
STATUS_ORDER = tuple(STATUS_COLOURS)
