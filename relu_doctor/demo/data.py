"""The demo's data: scikit-learn's 1,797 handwritten digits, shipped with that package.

``--data relu_doctor.demo.data:digits`` gives all of them, ``…:validation`` the 360 that no story trains on.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from relu_doctor.errors import ReLUDoctorError

NUM_VALIDATION = 360  # a fifth
BATCH_SIZE = 256
BRIGHTEST = 16.0  # the pixels are whole numbers from 0 to this
SPLIT_SEED = 0


@dataclass(frozen=True, slots=True, eq=False)
class Digits:
    """Images and their labels.

    Attributes:
        images: float32 of shape (inputs, 1, 8, 8), from 0 to 1.
        labels: int64 of shape (inputs,), from 0 to 9.
    """

    images: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)


def load_digits() -> Digits:
    """All images, in the order of the data set.

    Raises:
        ReLUDoctorError: scikit-learn is not installed.
    """
    try:
        from sklearn.datasets import load_digits as load
    except ImportError as error:
        raise ReLUDoctorError(
            "the demo trains on scikit-learn's handwritten digits, and scikit-learn is not installed: "
            "run `pip install scikit-learn`, then the demo again."
        ) from error
    bunch = load()
    images = torch.as_tensor(bunch.images, dtype=torch.float32, device="cpu").unsqueeze(1) / BRIGHTEST
    return Digits(images=images, labels=torch.as_tensor(bunch.target, dtype=torch.int64, device="cpu"))


def split_digits() -> tuple[Digits, Digits]:
    """The training and the validation part, drawn once and for all at random: the same for every story and seed."""
    everything = load_digits()
    generator = torch.Generator(device="cpu").manual_seed(SPLIT_SEED)
    order = torch.randperm(len(everything), generator=generator, device="cpu")
    validation, training = order[:NUM_VALIDATION], order[NUM_VALIDATION:]
    return (
        Digits(everything.images[training], everything.labels[training]),
        Digits(everything.images[validation], everything.labels[validation]),
    )


def digits() -> list[Tensor]:
    """All 1,797 images as batches of shape (inputs, 1, 8, 8)."""
    return list(load_digits().images.split(BATCH_SIZE))


def validation() -> list[Tensor]:
    """The 360 validation images as batches of shape (inputs, 1, 8, 8)."""
    return list(split_digits()[1].images.split(BATCH_SIZE))
