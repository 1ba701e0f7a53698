"""The zoo: small models that carry their own ground truth, one per way of applying a rectifier, one file per theme.

A new file in this folder is read like the others: each registers its cases.
"""

from __future__ import annotations

import pkgutil
from importlib import import_module

from tests.zoo.convolutions import Dense
from tests.zoo.functions import Functional
from tests.zoo.modules import BasicBlock, ResNet
from tests.zoo.registry import CASES, settled
from tests.zoo.signatures import TwoInputs

for _theme in pkgutil.iter_modules(__path__):
    import_module(f"{__name__}.{_theme.name}")

__all__ = ["CASES", "BasicBlock", "Dense", "Functional", "ResNet", "TwoInputs", "settled"]
