"""Colours of the statuses, which a picture shows side by side.

Any two of them differ by at least 20 in CIE76 for normal sight, and as protanopes, deuteranopes and tritanopes see them
(simulated after Machado, Oliveira and Fernandes 2009).
"""

from __future__ import annotations

from relu_doctor.terms import Status

STATUS_COLOURS = {
    Status.ACTIVE: "#E1E8EC",
    Status.RARE: "#8CC4E8",
    Status.DORMANT: "#2F6EA3",
    Status.UNPROVEN: "#F2B632",
    Status.DEAD: "#B3300F",
    Status.SATURATED: "#D458E8",
    Status.NON_FINITE: "#101418",
    Status.UNOBSERVED: "#9AA3AA",
}
