"""Gaussian noise from a cipher's key stream: what example-level DP adds on a processor.

AES in counter mode is a cryptographic generator: who sees some of its noise cannot compute the rest, as could be done
with torch's Mersenne Twister. Box and Muller (1958) make of two words of 32 bits two draws, in the type of what they
are added to. In float32 none is beyond sqrt(64 ln 2) = 6.66 standard deviations, 3e-11 of a true Gaussian's;
docs/performance.md says what that means.
"""

import math
import os

import torch
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from torch import Tensor

_AT_ONCE = 1 << 17
"""Draws that are made together: so many stay in a core's cache, and a call of torch costs little beside them."""
_HALF = float(1 << 31)


class KeyStream:
    """Random bytes under a key of its own, from the operating system's entropy; for one client and one round.

    It is made in the process that uses it: a fork would repeat it.
    """

    def __init__(self) -> None:
        cipher = Cipher(algorithms.AES(os.urandom(16)), modes.CTR(os.urandom(16)))
        self._encryptor = cipher.encryptor()

    def into(self, room: bytearray, size: int) -> None:
        """Make the first `size` bytes of `room` random; it is at least 16 longer.

        What lies there is encrypted in place: under a key stream any text becomes random.
        """
        self._encryptor.update_into(memoryview(room)[:size], room)


class Gaussian:
    """Room for the draws that are added to vectors of P entries, whoever they are drawn for."""

    def __init__(self, like: Tensor) -> None:
        """like: (P,), on the processor."""
        parts = max(1, -(-like.numel() // _AT_ONCE))
        self._half = max(1, -(-like.numel() // (2 * parts)))
        self._room = bytearray(8 * self._half + 16)
        self._words = torch.frombuffer(self._room, dtype=torch.int32, count=2 * self._half)
        self._uniform = (
            self._words.view(torch.float32)  # over the words themselves: less to keep in the cache
            if like.dtype == torch.float32
            else like.new_empty(2 * self._half)
        )
        self._turned = like.new_empty(self._half)

    def add(self, to: Tensor, deviation: float, stream: KeyStream) -> None:
        """Add to every entry of `to` (P,) a draw of N(0, deviation^2), in place."""
        half = self._half
        radius, angle, turned = self._uniform[:half], self._uniform[half:], self._turned
        for part in torch.split(to, 2 * half):
            stream.into(self._room, 8 * half)
            self._uniform.copy_(self._words)
            radii(radius)
            angle.mul_(math.pi / _HALF)
            for draws, turn in zip(torch.split(part, half), (torch.cos, torch.sin), strict=False):
                turn(angle, out=turned)
                draws.addcmul_(radius[: len(draws)], turned[: len(draws)], value=deviation)


def radii(words: Tensor) -> Tensor:
    """Words w of [-2^31, 2^31), in place, to sqrt(-2 ln(|w| / 2^31)); 0 counts as 1/2."""
    return words.pow_(-2).mul_(_HALF**2).clamp_(max=4 * _HALF**2).log_().sqrt_()
