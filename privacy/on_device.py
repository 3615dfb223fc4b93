"""DP where updates lie on a GPU: the generators of its noise, and client-level clipping without looking at an update.

Guarantee: what `clipped` gives is at most the clipping norm long in L2, after rounding too, as with its truth in
privacy/cohort_noise.py; the generators of `generators(None, device)` have their state from the operating system.

Legend: P is the number of entries of an update.
"""

import os

import torch
from torch import Tensor

from privacy import dp_sgd
from privacy.key_stream import KeyStream

_OFFSET = 1 << 62
"""Draws of CUDA's Philox count on from an offset of 8 bytes, a multiple of 4; from below this none comes around."""


def generators(seed: int | None, device: torch.device) -> tuple[dp_sgd.Source, torch.Generator]:
    """(of noise, on `device`; of samples, which are drawn here); of a seed, on the processor, one for both.

    So has Opacus it, and what is replayed from a seed is its bits.
    """
    here = dp_sgd.noise_generator(seed)
    if device.type != "cpu":
        return _there(seed, device), here
    return (KeyStream() if seed is None else here), here


def _there(seed: int | None, device: torch.device) -> torch.Generator:
    generator = torch.Generator(device=device)
    if seed is not None:
        return generator.manual_seed(seed)
    generator.set_state(philox_state())
    return generator


def philox_state() -> Tensor:
    """The 16 bytes of the state of torch's generator on CUDA, key and offset, from the operating system's entropy."""
    words = int.from_bytes(os.urandom(8), "little"), int.from_bytes(os.urandom(8), "little") % _OFFSET // 4 * 4
    return torch.frombuffer(bytearray(b"".join(word.to_bytes(8, "little") for word in words)), dtype=torch.uint8)


def clipped(update: Tensor, clip: float) -> tuple[Tensor, Tensor]:
    """(update (P,) scaled down to an L2 norm of at most `clip`; () whether it was that short before).

    One that is not finite counts as zero, and as short.
    """
    sound, wide = update.isfinite().all(), update.double()
    norm = wide.norm()
    within = (norm <= clip) | ~sound
    short = (wide * (clip / norm * (1 - 1e-6))).to(update.dtype)
    return torch.where(sound, torch.where(within, update, short), 0.0), within
