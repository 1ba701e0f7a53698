"""What holds for every test: one thread, since small kernels wait for each other, and the same examples each time."""

from __future__ import annotations

import torch
from hypothesis import settings

settings.register_profile("relu_doctor", deadline=None, derandomize=True, database=None)
settings.load_profile("relu_doctor")
torch.set_num_threads(1)
