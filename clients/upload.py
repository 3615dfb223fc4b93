"""What a client sends of its update: through a codec of floats, or as quantized integers that are summed as they are.

Integers in the clear (codec=intN, protect=none) and under protection are the same integers: `integers` makes them, and
`grid` is public, so that client and server make the same one from the settings and the task.

Legend: P is the number of entries of an update; k that of those which are sent, P but for codec=shared-topk
(clients/coordinates.py).
"""

import re

import numpy as np

from clients import codecs, coordinates
from clients.codecs import CodecError, Payload
from clients.task import Task
from privacy import bfv, coefficients, envelope, exact_counts, noise_shares, packing
from privacy.integers import FEWEST, MOST, Grid, Integers, width
from privacy.noise_shares import Shares
from privacy.refused import Refused
from scenarios.seeds import derive
from scenarios.settings import Settings, override
from scenarios.weights import Vector

_TAIL = 6
"""Standard deviations of local noise that are inside the range: 2e-9 of the coordinates lie outside."""


def bits(settings: Settings) -> int | None:
    """Bits of one quantized value; None where updates travel through a codec of floats, which is no sum of integers.

    Raises Refused for integers of no or too many bits, with the nearest possible.
    """
    if settings.protect.mode != "none":
        return settings.protect.bits
    match = re.fullmatch(r"int(\d{1,9})", coordinates.split(settings.codec)[1])
    if match and not FEWEST <= (number := int(match[1])) <= MOST:
        nearest = min(max(number, FEWEST), MOST)
        raise Refused(f"codec={settings.codec}: integers have {FEWEST} to {MOST} bits, the nearest is int{nearest}")
    return int(match[1]) if match else None


def in_the_clear(settings: Settings) -> Settings:
    """The same integers, summed without protection: for trials on one machine, which has nobody to hide from."""
    if settings.protect.mode == "none":
        return settings
    share, _ = coordinates.split(settings.codec)
    return override(settings, f"protect=none codec={coordinates.joined(share, f'int{settings.protect.bits}')}")


def everywhere(settings: Settings) -> Settings:
    """The same values at every coordinate: for audits, whose ghosts are among the coordinates that are sent."""
    return override(settings, f"codec={coordinates.split(settings.codec)[1]}")


def values(settings: Settings, size: int) -> int:
    """How many values of an update (P,) every client sends in a round: k where coordinates are shared, else P."""
    return coordinates.count(coordinates.split(settings.codec)[0], size)


def codec(settings: Settings) -> codecs.Codec:
    """Of the values that are sent, where they travel as floats."""
    return codecs.resolve(coordinates.split(settings.codec)[1])


def check(settings: Settings) -> None:
    """Raises Refused for a codec that does not exist."""
    if bits(settings) is None:
        codec(settings)


def grid(
    settings: Settings, size: int, number: int, clip: float, noise: float, shares: Shares | None = None
) -> Grid | None:
    """The grid of round `number` for updates (P,); None where they travel as floats.

    clip, noise, shares: `update_clip`, `update_noise` and `shares` of the round's tasks. An update that its client
    noised before rounding is as long as its noise made it: no norm is held, and the range leaves room for the noise.
    """
    return _grid(settings, values(settings, size), number, clip, noise, shares)


def _grid(settings: Settings, sent: int, number: int, clip: float, noise: float, shares: Shares | None) -> Grid | None:
    """sent: k."""
    made = _bare(settings, sent, number, clip, noise)
    return shares.on(made) if made and shares else made


def _bare(settings: Settings, size: int, number: int, clip: float, noise: float) -> Grid | None:
    wide, wanted = bits(settings), settings.protect
    if wide is None:
        return None
    if wanted.range is not None:
        return Grid(size, wide, wanted.range, wanted.max_clients, 0.0 if noise else clip)
    if noise:
        return Grid(size, wide, clip * (1 + _TAIL * 2 * noise), wanted.max_clients)
    seed = derive(settings.run.seed, "rotation", number)
    return Grid.default(size, wide, wanted.max_clients, clip, seed)


def grid_of(task: Task, settings: Settings) -> Grid | None:
    """`grid` of the round of `task`; for a task without weights that of the entries that it speaks of.

    Test results that are hidden have one of their own, the same in every evaluation.
    """
    if task.kind == "protect" and task.protection is None:
        raise Refused("the task is without the protection that this node's settings ask for")
    if task.kind == "evaluate" or (task.kind == "protect" and task.protection and task.protection.of_tests):
        return exact_counts.grid(settings.protect.bits, settings.protect.max_clients)
    if task.kind == "protect" and task.protection:
        sent = task.protection.entries - 2
    else:
        sent = values(settings, len(task.weights))
    if sent < 1:
        raise Refused(f"the task speaks of an update of {sent} values, it has one at least")
    return _grid(settings, sent, task.round, task.update_clip, task.update_noise, task.shares)


def weight(task: Task, examples: int) -> float:
    """What a client of so many examples weighs in a sum of integers, in (0, 1]. Raises Refused for a largest below."""
    if examples > task.largest > 0:
        raise Refused(f"the task says that no client has more than {task.largest} examples, this one has more")
    return examples / task.largest if task.largest else 1.0


def size(settings: Settings, entries: int, grid: Grid | None = None) -> int:
    """Bytes that one client sends of an update of `entries` entries; masked ones are taken as in the clear.

    grid: of any round of them, where clients add noise to their integers.
    """
    if (wide := grid.field if grid else bits(settings)) is None:
        return codec(settings).bytes(values(settings, entries))
    if settings.protect.mode == "encrypted":
        made = encryption(settings, entries, grid)
        return envelope.length(made.count, coefficients.size(made))
    return packing.size(values(settings, entries) + 2, wide)


def encryption(settings: Settings, entries: int, grid: Grid | None = None) -> bfv.Parameters:
    """How an update of `entries` entries is encrypted. Raises Refused with the nearest that is possible."""
    wanted = settings.protect
    wide = grid.width if grid else width(wanted.bits, wanted.max_clients)
    return bfv.fit(wanted.trust, values(settings, entries) + 2, wide, wanted.max_clients)


def integers(update: Vector, within: bool, examples: int, task: Task, settings: Settings, grid: Grid) -> Integers:
    """The entries (k + 2,) of what one client adds to the sum, its share of the noise on them where there are shares.

    The sum of clip bits has no noise, so there they say nothing. Raises CodecError for an update that is not finite.
    """
    seed = derive(settings.run.seed, "codec", task.round, task.client)
    try:
        entries = grid.quantize(update, weight(task, examples), within or bool(grid.noise), seed)
    except ValueError as error:
        raise CodecError(str(error)) from None
    if not grid.noise:
        return entries
    wanted = settings.privacy.noise_seed
    noise = noise_shares.entropy(None if wanted is None else derive(wanted, "noise", task.round, task.client))
    return noise_shares.added(entries, grid, noise)


def encode(
    update: Vector, residual: Vector | None, within: bool, examples: int, task: Task, settings: Settings
) -> tuple[Payload, Vector | None]:
    """(the payload for update (k,), in the clear; the next residual, where the codec keeps one)."""
    if (made := grid_of(task, settings)) is not None:
        return packing.pack(integers(update, within, examples, task, settings, made), made.field), None
    seed = derive(settings.run.seed, "codec", task.round, task.client)
    return codec(settings).encode(update, residual, seed)


def unpack(payload: Payload, expected: float, grid: Grid) -> Integers:
    """The entries (k + 2,) of one client's payload, checked; raises ValueError for what no honest client sends.

    expected: the client's `weight`, as it follows from the examples that it said it has.
    """
    entries = packing.unpack(payload, grid.entries, grid.field)
    grid.check(entries)
    if int(entries[-2]) != grid.weigh(expected):
        raise ValueError(f"a weight of {entries[-2]}, its examples make {grid.weigh(expected)}")
    return entries


def decode(payload: Payload, task: Task, settings: Settings) -> Vector:
    """The update (k,) that a server reads off one payload in the clear; raises ValueError for bytes that are none."""
    if (made := grid_of(task, settings)) is None:
        return codec(settings).decode(payload, values(settings, len(task.weights)))
    entries = packing.unpack(payload, made.entries, made.field)
    made.check(entries)
    total, weighed, _ = made.read(entries, 1)
    return (total / weighed).astype(np.float32)
