"""Protected sums beside NVFLARE's parameters (CKKS 8192 [60, 40, 40], scale 2^40, symmetric) on the same flat vector.

    python benchmarks/protected.py [--entries N] [--clients N] [--cohort N] [--repeats N] [--json FILE]

One core, CPU time, medians over the repeats, all in the same run. Integers: from an update of length C to integers of
the grid of C, which is rotated at 9 bits. Client: from integers (NVFLARE: from floats) to bytes; of masks all stages of
a round of `cohort` clients, of which a third drops once it has shared. Its ratio counts the integers with it. Server:
what one client costs, in `shared` the worker process with it, of masks its part of the unmasking. Opening: from the
bytes of the aggregate to integers, checks included; of masks the unmasking, once a round. Upload is a multiple of fp32.
Memory: by how many MB the server's peak grew after two updates were in, and what the worker process has. Stall: the
longest that another thread waited during one encryption or masking.
"""

import argparse
import json
import os
import secrets
import statistics
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import tenseal as ts
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from privacy import bfv, frames, key_letter, masked_sum, masks, packing
from privacy.bfv import Trust
from privacy.encrypted_sum import EncryptedSum, Protector
from privacy.expansion import Worker
from privacy.frames import Attempt, Rules, Stage
from privacy.integers import Grid
from privacy.keyholder import KeyHolder
from privacy.transcript import FileStore

CASES: dict[str, tuple[Trust, int]] = {
    "split, 16 bits": ("split", 16),
    "shared, 16 bits": ("shared", 16),
    "split, 9 bits": ("split", 9),
    "shared, 9 bits": ("shared", 9),
}
BITS = (16, 9)
MOST = 100
_BASE = "NVFLARE's parameters"
_COLUMNS = {
    "upload": ("upload", ".3f"),
    "integers": ("integers s", ".3f"),
    "client": ("client s", ".3f"),
    "client ratio": ("ratio", ".3f"),
    "server": ("server s", ".4f"),
    "server ratio": ("ratio", ".3f"),
    "opening": ("opening s", ".3f"),
    "growth": ("MB more", ".0f"),
    "worker": ("worker", ".0f"),
    "stall": ("stall ms", ".1f"),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--entries", type=int, default=1_663_370)
    parser.add_argument("--clients", type=int, default=16, help="ciphertexts that are added; each costs the same")
    parser.add_argument("--cohort", type=int, default=MOST, help="clients of a masked round, on which k depends")
    parser.add_argument("--repeats", type=int, default=5, help="encryptions that are timed")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    found = costs(options)
    if options.json:
        options.json.write_text(json.dumps(found, indent=2) + "\n")


def costs(options: argparse.Namespace) -> dict[str, dict[str, float]]:
    """Measure and print every row."""
    whole = {bits: clear(bits, options.entries, options.repeats) for bits in BITS}
    rows = {f"in the clear, {bits} bits": whole[bits] for bits in BITS}
    for bits in BITS:
        rows[f"masked, {bits} bits"] = masked(bits, options.entries, options.cohort)
    rows |= {name: ours(*case, options.entries, options.clients, options.repeats) for name, case in CASES.items()}
    for name, row in rows.items():
        row["integers"] = whole[16 if "16" in name else 9]["integers"]
    rows[_BASE] = nvflare(options.entries, options.repeats) | {"integers": 0.0}
    base = rows[_BASE]
    for row in rows.values():
        row["client ratio"] = (row["integers"] + row["client"]) / base["client"]
        row["server ratio"] = row["server"] / base["server"]
    print(f"{options.entries} entries, masks of {options.cohort} clients, medians of {options.repeats}")
    print(f"{'':24}" + "".join(f"{title:>11}" for title, _ in _COLUMNS.values()))
    for name, row in rows.items():
        print(f"{name:24}" + "".join(f"{row[key]:11{form}}" for key, (_, form) in _COLUMNS.items()))
    return rows


def clear(bits: int, entries: int, repeats: int) -> dict[str, float]:
    """What integers cost that nothing hides."""
    grid, draw = Grid.default(entries - 2, bits, MOST, 1.0, 0), np.random.default_rng(0)
    update = draw.standard_normal(grid.size).astype(np.float32)
    update /= np.linalg.norm(update)
    made = [timed(lambda seed=seed: grid.quantize(update, 0.5, True, seed)) for seed in range(repeats)]
    integers = made[0][1]
    packed = [timed(lambda: packing.pack(integers, bits)) for _ in range(repeats)]
    total = np.zeros(entries, np.uint64)

    def add() -> None:
        sent = packing.unpack(packed[0][1], entries, bits)
        grid.check(sent)
        total[:] += sent

    return {
        "upload": len(packed[0][1]) / (4 * entries),
        "integers": statistics.median(seconds for seconds, _ in made),
        "client": statistics.median(seconds for seconds, _ in packed),
        "server": statistics.median(timed(add)[0] for _ in range(repeats)),
        "opening": 0.0,
        "growth": 0.0,
        "worker": 0.0,
        "stall": 0.0,
    }


def masked(bits: int, entries: int, cohort: int) -> dict[str, float]:
    """One round of a cohort, of which a third drops once it has shared; medians over those that stay."""
    rules = Rules(entries, bits + (MOST - 1).bit_length(), max(3, cohort // 2))
    identities = {f"silo-{i:04}": Ed25519PrivateKey.generate() for i in range(cohort)}
    known = {name: key.public_key().public_bytes_raw() for name, key in identities.items()}
    gone = set(list(known)[::3][: cohort // 3])
    integers = np.random.default_rng(0).integers(0, 1 << bits, entries, np.uint64)
    server = masked_sum.Server(Attempt(frames.run_id("bench", rules), 1, 1), rules, known, list(known))
    client, sent, serving = dict.fromkeys(known, 0.0), dict.fromkeys(known, 0), 0.0
    stall, peaks = 0.0, [0.0, 0.0]
    with tempfile.TemporaryDirectory() as folder:

        def member(name: str) -> masks.Client:
            return masks.Client(name, identities[name], known, "bench", rules, FileStore(Path(folder) / name))

        while True:
            seconds, requests = timed(server.ask)
            serving += seconds
            if not requests:
                break
            turn = server.stage is Stage.MASK
            if turn:  # one whose vector is not heard
                name = min(gone)
                stall = stalled(lambda name=name, asked=requests[name]: member(name).answer(asked, integers))
            for name in known.keys() - gone if server.stage >= Stage.MASK else known:
                seconds, answer = timed(lambda name=name, asked=requests[name]: member(name).answer(asked, integers))
                client[name], sent[name] = client[name] + seconds, sent[name] + len(answer)
                (Path(folder) / f"{name}.sent").write_bytes(answer)
            del answer
            for i, name in enumerate(sorted(known.keys() - gone if server.stage >= Stage.MASK else known)):
                answer = (Path(folder) / f"{name}.sent").read_bytes()
                seconds, _ = timed(lambda name=name, answer=answer: server.hear(name, answer))
                serving += seconds
                if turn and i == 1:
                    peaks[0] = forget_peak()
            peaks[1] = peak() if turn else peaks[1]
    unmasking, found = timed(server.result)
    stay = len(known) - len(gone)
    assert (found.values == stay * integers).all()
    return {
        "upload": statistics.median(sent[name] for name in known.keys() - gone) / (4 * entries),
        "client": statistics.median(client[name] for name in known.keys() - gone),
        "server": (serving + unmasking) / cohort,
        "opening": unmasking,
        "growth": peaks[1] - peaks[0],
        "worker": 0.0,
        "stall": stall,
    }


def ours(trust: Trust, bits: int, entries: int, clients: int, repeats: int) -> dict[str, float]:
    """What one setting costs each side."""
    parameters = bfv.fit(trust, entries, bits + (MOST - 1).bit_length(), MOST)
    private = {f"silo-{i}": X25519PrivateKey.generate() for i in range(clients)}
    public = {name: key.public_key().public_bytes_raw() for name, key in private.items()}
    holder = KeyHolder(Path(tempfile.mkdtemp()), public)
    deal = holder.deal("bench", 1, parameters)
    identity = Ed25519PublicKey.from_public_bytes(holder.identity)
    protectors = {
        name: Protector(key_letter.read(deal.letters[name], deal.public, "bench", name, 1, parameters, identity, key))
        for name, key in private.items()
    }
    integers = np.random.default_rng(0).integers(0, 1 << bits, entries, np.uint64)
    first = next(iter(protectors.values()))
    client = [timed(lambda: first.protect(1, integers))[0] for _ in range(repeats)]
    updates = {name: protector.protect(1, integers) for name, protector in protectors.items()}
    stall = stalled(lambda: first.protect(1, integers))

    worker, spent = Worker(parameters), []
    if trust == "shared":
        worker.add(secrets.token_bytes(64 * parameters.count))  # its imports are paid once a run
    peaks, before = [], children(worker)
    server = EncryptedSum(parameters, deal.key_id, "bench", 1, deal.mac_keys, worker)
    for i, (name, update) in enumerate(updates.items()):
        spent.append(timed(lambda name=name, update=update: server.add(name, update))[0])
        if i in (1, clients - 1):
            peaks.append(peak() if i > 1 else forget_peak())
    sealing, aggregate = timed(lambda: server.seal(deal.link_key))
    expanding = (children(worker) - before) / clients
    beside = peak(worker.pid) if worker.pid else 0.0
    worker.close()
    opening, published = timed(lambda: holder.open("bench", 1, server.roster, aggregate))
    assert (packing.unpack(published, entries, parameters.width) == clients * integers).all()
    return {
        "upload": len(updates["silo-0"]) / (4 * entries),
        "client": statistics.median(client),
        "server": statistics.median(spent) + expanding + sealing / MOST,
        "opening": opening,
        "growth": peaks[1] - peaks[0],
        "worker": beside,
        "stall": stall,
    }


def nvflare(entries: int, repeats: int) -> dict[str, float]:
    """The same by CKKS, chunk by chunk of 4096 slots."""
    context = ts.context(
        ts.SCHEME_TYPE.CKKS, 8192, coeff_mod_bit_sizes=[60, 40, 40], encryption_type=ts.ENCRYPTION_TYPE.SYMMETRIC
    )
    context.global_scale = 2**40
    values = np.random.default_rng(0).uniform(-1, 1, entries)
    chunks = [values[i : i + 4096] for i in range(0, entries, 4096)]

    def encrypt() -> list[bytes]:
        return [ts.ckks_vector(context, chunk.tolist()).serialize() for chunk in chunks]

    def add(total: list[Any], update: list[bytes]) -> list[Any]:
        return [whole + ts.ckks_vector_from(context, one) for whole, one in zip(total, update, strict=True)]

    client = [timed(encrypt)[0] for _ in range(repeats)]
    update, peaks = encrypt(), []
    total = [ts.ckks_vector_from(context, one) for one in update]
    spent = []
    for i in range(3):
        seconds, total = timed(lambda total=total: add(total, update))
        spent.append(seconds)
        if i in (0, 2):
            peaks.append(peak() if i else forget_peak())
    return {
        "upload": sum(map(len, update)) / (4 * entries),
        "client": statistics.median(client),
        "server": statistics.median(spent),
        "opening": timed(lambda: [one.decrypt() for one in total])[0],
        "growth": peaks[1] - peaks[0],
        "worker": 0.0,
        "stall": stalled(lambda: ts.ckks_vector(context, values.tolist()).serialize()),
    }


def timed(call: Callable[[], Any]) -> tuple[float, Any]:
    """(seconds of this process's CPU, what it returned)."""
    start = time.process_time()
    value = call()
    return time.process_time() - start, value


def peak(pid: int | str = "self") -> float:
    """MB that a process had at most, this one since `forget_peak`."""
    lines = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    return int(lines["VmHWM"].split()[0]) / 1024


def forget_peak() -> float:
    """Let the peak begin at what the process has now; returns that, in MB."""
    Path("/proc/self/clear_refs").write_text("5")
    return peak()


def children(worker: Worker) -> float:
    """Seconds of CPU that the worker process has used."""
    if worker.pid is None:
        return 0.0
    fields = Path(f"/proc/{worker.pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def stalled(call: Callable[[], Any]) -> float:
    """The longest that a thread which wants to run each millisecond was kept waiting, in milliseconds."""
    gaps, stop = [0.0], threading.Event()

    def tick() -> None:
        last = time.perf_counter()
        while not stop.is_set():
            time.sleep(0.001)
            now = time.perf_counter()
            gaps.append(now - last - 0.001)
            last = now

    thread = threading.Thread(target=tick)
    thread.start()
    call()
    stop.set()
    thread.join()
    return 1000 * max(gaps)


if __name__ == "__main__":
    main()
