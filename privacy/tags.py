"""Tags: what proves that an opened sum is that of a roster's ciphertexts; the client's half and the key holder's.

Slot 0 of ciphertext k of client i holds pad(i, round, shown, k) + sum_j weight_j x slot_j mod t. The pad is
pseudo-random under a secret of client i and the key holder, the weights under one that all clients share with the key
holder. `shown` is the hash of what the server showed to the client, and has to be the same for all of a roster: a
server that gave all but one another model would find that one's update alone in the sum (Pasquini, Francati and
Ateniese 2022). Tags
add as slots do, so the sum's slot 0 must be the sum of the roster's pads plus the weighted sum of the *opened* slots.

Whoever knows neither secret passes with a chance of 1 / t for anything but the sum itself: copies, a client swapped or
left out and constants added give other pads. The pads alone would not do: multiplied by a short polynomial that is 1 in
slot 0 and 0 in some slot j, a ciphertext keeps its tag and loses that slot, and the sum shows one client's slot j. The
weights see that, even where the server has learned them from a client: it would have to know the slots it changes.
(A universal hash under one-time pads: Wegman and Carter 1981, Agrawal and Boneh 2009 for its sums.)

Legend: K ciphertexts, J = 4095 data slots, t the plain modulus.
"""

import hashlib
import struct

import numpy as np

from privacy.bfv import DATA_SLOTS, Integers

_LIMB = 26
_MASK = np.uint64((1 << _LIMB) - 1)


def pads(secret: bytes, run: str, round: int, client: str, count: int, plain: int, shown: bytes = b"") -> list[int]:
    """The pads of `count` ciphertexts mod `plain`. 16 bytes each: the bias is below 2^-76."""
    names = b"".join(struct.pack("<I", len(name)) + name for name in (run.encode(), client.encode(), shown))
    return _numbers(b"umbel pad" + secret + names + struct.pack("<I", round), count, plain)


def weights(secret: bytes, plain: int) -> Integers:
    """(J,), for all rounds under one key: fresh pads hide what they say."""
    return np.array(_numbers(b"umbel weights" + secret, DATA_SLOTS, plain), np.uint64)


def weighted(slots: Integers, weights: Integers, plain: int) -> list[int]:
    """sum_j weights_j x slots (K, 4096)_kj mod t, for each k. Limbs of 26 bits, 4095 products stay below 2^64."""
    totals = [0] * len(slots)
    halves = [weights & _MASK, weights >> np.uint64(_LIMB)]
    for i, limb in enumerate((slots[:, 1:] & _MASK, slots[:, 1:] >> np.uint64(_LIMB))):
        for j, half in enumerate(halves):
            shift = 1 << (_LIMB * (i + j))
            for k, sum_of_products in enumerate((limb @ half).tolist()):
                totals[k] += sum_of_products * shift
    return [total % plain for total in totals]


def write(slots: Integers, pads: list[int], weights: Integers, plain: int) -> None:
    """The client's half: put the tags into slot 0 of slots (K, 4096)."""
    sums = weighted(slots, weights, plain)
    slots[:, 0] = [(pad + total) % plain for pad, total in zip(pads, sums, strict=True)]


def hold(slots: Integers, pads: list[list[int]], weights: Integers, plain: int) -> bool:
    """The key holder's half: whether the opened slots (K, 4096) are the sum of the ciphertexts with these pads."""
    sums = weighted(slots, weights, plain)
    expected: list[int] = [
        (sum(each) + total) % plain for each, total in zip(zip(*pads, strict=True), sums, strict=True)
    ]
    return expected == [int(tag) for tag in slots[:, 0]]


def _numbers(seed: bytes, count: int, modulus: int) -> list[int]:
    stream = hashlib.shake_256(seed).digest(16 * count)
    return [int.from_bytes(stream[i : i + 16], "little") % modulus for i in range(0, len(stream), 16)]
