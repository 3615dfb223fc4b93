"""Task and Reply: what a server asks of one client, and what comes back. Plain values, the same on every runtime."""

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from privacy.chain import Head
from privacy.noise_shares import Shares
from privacy.plan import Mechanism
from scenarios.weights import Layout, Vector

_TESTS = "tests"


@dataclass(frozen=True)
class Device:
    """What one client's device can do. Zero means: no limit."""

    speed: float = 0.0
    """Training examples a second (forward and backward)."""
    down: float = 0.0
    """Bytes a second towards the client."""
    up: float = 0.0
    """Bytes a second from the client."""
    memory: int = 0
    """Bytes for a model in training."""
    availability: float = 1.0
    """Chance to be reachable when a round begins."""


@dataclass(frozen=True)
class Hello:
    """What a client says once, before round 1. Its name identifies it from then on."""

    name: str
    examples: int
    digest: str
    """Of its training data: evidence that a resumed run sees the same data."""
    device: Device = Device()
    head: Head | None = None
    """Of the device's own ledger; None where it keeps none."""
    seen: Head | None = None
    """Of the server's ledger, as this device's own last saw it."""
    identity: str = ""
    """Its Ed25519 public key, 64 hexadecimal digits, where updates are masked; else empty."""
    recipient: str = ""
    """Its X25519 public key, 64 hexadecimal digits, where updates are encrypted; else empty."""


@dataclass(frozen=True)
class KeyNode:
    """What the node of a key holder says: that it is one, and no client."""

    identity: str
    """Its Ed25519 public key, 64 hexadecimal digits. Clients know it from elsewhere."""


@dataclass(frozen=True)
class Charge:
    """What the server's ledger says of a task; the ledger of the device that adds its noise goes by it."""

    run: str
    """The run's name in the ledger."""
    attempt: int
    """From 1: how often this round was asked for, after crashes of the server."""
    head: Head
    """Of the server's ledger, with this task's reservation in it."""
    known: Head | None = None
    """Of the device's own ledger, as the server last saw it."""


@dataclass(frozen=True)
class Protection:
    """What the server says to a client so that it may hide what it adds (privacy/masks.py, privacy/key_letter.py)."""

    run: str
    """The run's name in the protocol, which may go on after a colon: sums of test results have one of their own."""
    entries: int
    """Integers of what a client adds."""
    minimum: int
    """Fewest clients whose sum may be read."""
    request: bytes
    """The protocol's own message: of masks, or the key under which to encrypt."""

    @property
    def base(self) -> str:
        """The name of the run, whatever is summed in it."""
        return self.run.partition(":")[0]

    @property
    def of_tests(self) -> bool:
        """Whether test results are summed, no updates."""
        return self.run.split(":")[1:2] == [_TESTS]


def tests_of(run: str) -> str:
    """The name under which the test results of `run` are summed: with rounds, keys and records of their own."""
    return f"{run}:{_TESTS}"


@dataclass(frozen=True)
class Task:
    """One client's work in one round."""

    kind: Literal["train", "evaluate", "protect"]
    """protect: a stage of the protocol that hides updates, before or after training."""
    round: int
    client: str
    weights: Vector
    """(P,) float32, the round's weights."""
    layout: Layout
    """Names and shapes of the weights: those of a pruned model in recovery rounds."""
    rate: float = 0.0
    """Learning rate of this round."""
    steps: int = 0
    """Local steps to take (fewer where the deadline comes first)."""
    control: Vector | None = None
    """(P,) float32, the server's control variate (clients/scaffold.py); None: without."""
    coordinates: NDArray[np.uint32] | None = None
    """(k,), increasing: those that every client of the round sends (clients/coordinates.py); None: all."""
    state_round: int = 0
    """The round whose client state this task goes on from; 0: none yet."""
    deadline: float = 0.0
    """Seconds of wall clock in which the reply must be ready; 0: none. Only real devices look at it."""
    mechanism: Mechanism | None = None
    """Example-level DP; None: without."""
    clip: float = 0.0
    """Clipping norm of one example's gradient."""
    update_clip: float = 0.0
    """Client-level and local DP: clipping norm of the whole update; 0: without."""
    update_noise: float = 0.0
    """Local DP: standard deviation of the noise on the update in units of 2 x update_clip; 0: without."""
    shares: Shares | None = None
    """Client-level DP with noise in shares: of what noise this client adds a share; None: the server adds it."""
    largest: int = 0
    """Examples of the client that has most of them, which weighs 1 in a sum of integers; 0: all weigh the same."""
    charge: Charge | None = None
    """Only where the client adds noise that is charged to a ledger."""
    protection: Protection | None = None
    """Only where updates are protected."""

    @property
    def download(self) -> int:
        """Bytes of the arrays that travel to the client."""
        return sum(array.nbytes for array in (self.weights, self.control, self.coordinates) if array is not None)


@dataclass(frozen=True)
class Summand:
    """In a payload's place: an update that is in the sum of its block. Never on a wire."""

    bytes: int
    """Of the payload that it stands for."""
    weight: float
    """What the update weighs in the sum."""
    total: NDArray[np.float64] | None = None
    """(P,) the block's sum of weights times updates; on the last reply of a block that has one."""
    whole: float = 0.0
    """Beside `total`: the sum of the weights in it."""


@dataclass(frozen=True)
class Way:
    """How a block trained a client (clients/ways.py). A device does not say it."""

    name: Literal["gram", "rows", "fused", "single"]
    why: str = ""
    """Why not as the one before it, in words that quote no data; empty for gram and rows."""
    precision: str = "float32"


@dataclass(frozen=True)
class Reply:
    """What one client made of its task; with a reason it made nothing of it."""

    round: int
    client: str
    payload: bytes = b""
    """train: the encoded update (new weights minus the task's weights); protect: the protocol's answer; evaluate: test
    results that are hidden, and then `examples`, `loss` and `correct` say nothing."""
    examples: int = 0
    """train: training examples; evaluate: test examples."""
    steps: int = 0
    """train: steps taken."""
    loss: float = 0.0
    """evaluate: mean loss over the test examples."""
    correct: int = 0
    """evaluate: test examples classified right."""
    reason: str = ""
    """Why there is no result; empty for a good reply."""
    late: bool = False
    """The deadline came before the reply."""
    within: bool = True
    """train: whether the update was within the task's update_clip before it was clipped."""
    head: Head | None = None
    """train: of the device's own ledger, with this task's reservation in it."""
    summand: Summand | None = None
    """train: instead of a payload, where blocks of clients are trained at once."""
    way: Way | None = None
    """train: how, where blocks of clients are."""
