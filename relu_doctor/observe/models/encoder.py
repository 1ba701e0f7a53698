"""nn.TransformerEncoder in eval mode: padding that its fused path never computes.

Given a padding mask, that path packs the sequences without their padding, and puts zeros in the place of padding at the
end. Its rectifiers are inside a kernel that nothing sees, so a scan lets the layers run one by one; what comes out at
padding must be zero all the same, since a mean over time may follow.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn


def unpacked(encoder: nn.TransformerEncoder) -> Callable[..., Tensor]:
    """A forward of an encoder that gives what its fused path gives, layer by layer.

    Args:
        encoder: whose own forward is called wherever that path would not be taken.
    """

    def forward(
        src: Tensor,
        mask: Tensor | None = None,
        src_key_padding_mask: Tensor | None = None,
        is_causal: bool | None = None,
    ) -> Tensor:
        if src_key_padding_mask is None or mask is not None or not _packs(encoder, src, src_key_padding_mask):
            return type(encoder).forward(encoder, src, mask, src_key_padding_mask, is_causal)
        output = src
        for layer in encoder.layers:
            output = layer(output, src_key_padding_mask=src_key_padding_mask)
        output = output.masked_fill(_is_padding(src_key_padding_mask)[..., None], 0)
        return output if encoder.norm is None else encoder.norm(output)

    return forward


def _packs(encoder: nn.TransformerEncoder, src: Tensor, padding: Tensor) -> bool:
    """Whether the fused path would be taken if no gradients were wanted."""
    if not torch.backends.mha.get_fastpath_enabled() or torch.is_autocast_enabled(src.device.type):
        return False
    if not encoder.use_nested_tensor or encoder.layers[0].training or src.dim() != 3 or src.is_nested:
        return False
    return not encoder.mask_check or torch._nested_tensor_from_mask_left_aligned(src, ~_is_padding(padding))


def _is_padding(mask: Tensor) -> Tensor:
    """A padding mask is true at padding, or is added to scores."""
    return mask if mask.dtype == torch.bool else mask != 0
