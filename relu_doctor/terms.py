"""The glossary in code: the closed sets of words that a diagnosis uses, spelled once."""

from __future__ import annotations

from enum import StrEnum


class Status(StrEnum):
    """What can be said of one unit. Exactly one holds, in this order of precedence."""

    UNOBSERVED = "unobserved"  # its rectifier was never called on any input
    NON_FINITE = "non_finite"  # NaN or Inf reached the rectifier
    DEAD = "dead"  # silent on every input, and enough inputs were seen
    UNPROVEN = "unproven"  # silent on every input, but too few were seen to say dead
    SATURATED = "saturated"  # never left the flat high side (ReLU6, hardtanh)
    RARE = "rare"  # fired, at a rate under the threshold
    DORMANT = "dormant"  # fires, but its mean output is tiny beside its site's
    ACTIVE = "active"


class Mechanism(StrEnum):
    """What holds a silent unit down, read from one snapshot. The first rule that holds wins."""

    NONE = ""
    NON_FINITE = "non_finite"
    ZERO_WEIGHTS = "zero_weights"
    DEAD_UPSTREAM = "dead_upstream"
    CONSTANT_INPUTS = "constant_inputs"
    NORMALIZATION = "normalization"
    NEGATIVE_BIAS = "negative_bias"
    INPUT_OFFSET = "input_offset"
    BIAS_OR_OFFSET = "bias_or_offset"
    BIAS_AND_OFFSET = "bias_and_offset"
    NOT_SELECTED = "not_selected"  # lies where it could fire, and a top-k or a threshold passes it over
    SATURATED = "saturated"
    UNKNOWN = "unknown"


class Mode(StrEnum):
    """How the model is run while it is observed."""

    EVAL = "eval"
    TRAIN = "train"
    BOTH = "both"


class Statistics(StrEnum):
    """How much is measured per unit."""

    FULL = "full"
    MINIMAL = "minimal"


class Evidence(StrEnum):
    """What counts as one unit of evidence."""

    INPUT = "input"  # an image, a sequence: its positions are correlated
    TOKEN = "token"  # every position that is no padding


class Severity(StrEnum):
    """The verdict on a whole model, from its silent fraction."""

    HEALTHY = "healthy"
    MILD = "mild"
    SERIOUS = "serious"
    CRITICAL = "critical"
    INCONCLUSIVE = "inconclusive"
    NON_FINITE = "non_finite"
