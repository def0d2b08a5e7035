"""VectorQuantizer: a VQ-VAE's bottleneck, whose codebook is learned along with a model.

van den Oord, Vinyals and Kavukcuoglu 2017 ("Neural discrete representation learning"): the codebook
follows what is coded, by moving averages or by the gradient of `|sg(z) - e|^2` (see
`kmeans.learning`); what is coded is drawn to it by the commitment loss
`commitment * |z - sg(e)|^2`, and gets the gradient of its code straight through.
"""

from __future__ import annotations

import dataclasses
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn

from vqkernels.errors import SpecError
from vqkernels.quantize.kmeans import assign
from vqkernels.quantize.kmeans.learning import MovingAverage

__all__ = ["Quantized", "VectorQuantizer"]


@dataclasses.dataclass(frozen=True)
class Quantized:
    """What a VectorQuantizer gives for `z: [..., length]`.

    values: the entries, with z's gradient straight through. codes: `[...]` int64.
    loss: commitment loss, and codebook loss where the codebook is a parameter; a mean over z.
    perplexity: `exp` of the entropy of the batch's codes: so many codes are in use.
    """

    values: Tensor
    codes: Tensor
    loss: Tensor
    perplexity: Tensor


class VectorQuantizer(nn.Module):
    """A VQ-VAE's bottleneck: `z: [..., length]` to its nearest entries, trained along with a model.

    update: `ema` (the codebook is a buffer) or `gradient` (a parameter, by the codebook loss).
    commitment, decay: as above. expiry: an entry expires below this share of the mean use; 0:
    never. In evaluation mode nothing is learned. Raises SpecError for options out of range,
    ValueError for a z of another length.
    """

    codebook: Tensor
    mass: Tensor
    sums: Tensor

    def __init__(
        self,
        entries: int,
        length: int,
        *,
        update: Literal["ema", "gradient"] = "ema",
        commitment: float = 0.25,
        decay: float = 0.99,
        expiry: float = 0.01,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if update not in ("ema", "gradient") or min(entries, length) < 1 or not 0 <= decay < 1:
            raise SpecError(
                f"VectorQuantizer: {entries} entries of {length}, update {update!r}, decay {decay}"
                f"; use 1 or more, 'ema' or 'gradient', and 0 <= decay < 1"
            )
        self.update, self.commitment, self.decay, self.expiry = update, commitment, decay, expiry
        self._draws = np.random.default_rng(seed)
        first = torch.from_numpy(self._draws.standard_normal((entries, length))).float()
        if update == "gradient":
            self.codebook = nn.Parameter(first)
        else:
            self.register_buffer("codebook", first)
        self.register_buffer("mass", torch.zeros(entries, length))
        self.register_buffer("sums", torch.zeros(entries, length))

    def forward(self, z: Tensor) -> Quantized:
        """The nearest entries of `z`; in training mode, one step of learning too."""
        length = self.codebook.shape[1]
        if z.shape[-1] != length:
            raise ValueError(f"z ends in {z.shape[-1]}, but entries have {length} elements")
        flat = z.reshape(-1, length)
        codes = assign(flat, self.codebook.detach()).to(z.device)
        chosen = self.codebook[codes]
        loss = self.commitment * (flat - chosen.detach()).square().mean()
        if self.update == "gradient":
            loss = loss + (chosen - flat.detach()).square().mean()
        if self.training:
            self._learn(flat.detach(), codes)
        share = torch.bincount(codes, minlength=len(self.codebook)) / max(1, len(codes))
        values = flat + (chosen - flat).detach()
        return Quantized(
            values.reshape(z.shape),
            codes.reshape(z.shape[:-1]),
            loss,
            torch.special.entr(share).sum().exp(),
        )

    @torch.no_grad()
    def _learn(self, flat: Tensor, codes: Tensor) -> None:
        """Follow the batch (`ema`), or only its counts; entries that nothing uses expire."""
        average = MovingAverage(self.codebook[None], decay=self.decay)
        average.mass, average.sums = self.mass[None], self.sums[None]
        draws = torch.from_numpy(self._draws.random((1, len(self.codebook)))).to(flat.device)
        average.count(flat[None], codes[None])
        if self.update == "ema":
            average.follow()
        average.expire(flat[None], draws, self.expiry)
        self.codebook.copy_(average.entries[0])
        self.mass.copy_(average.mass[0])
        self.sums.copy_(average.sums[0])
