"""Seeds derived from the run's seed and plain labels, never from node ids or the order of arrival."""

import hashlib


def derive(seed: int, *labels: str | int) -> int:
    """A 63-bit seed for (seed, labels). Equal on every machine; different labels give unrelated seeds."""
    text = "\x1f".join([str(seed), *(f"{type(label).__name__}:{label}" for label in labels)])
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1
