"""Processes that train blocks of clients: forked from the run's own, so that they share its data and need no start.

A block comes out the same in whichever process it is trained. The weights, and the sums that come back, lie in memory
that both sides share; the rest travels by pipe. A worker that dies is named, and another trains its block again, with
the same batches; noise is drawn anew. A block that ends three of them is trained client by client, and who ends a
worker alone is left out of the round. Its sum is then that of these updates, in the order of the tasks.

Legend: P is the number of weights.
"""

import gc
import mmap
import multiprocessing
import os
import signal
import warnings
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from multiprocessing.connection import Connection, wait

import numpy as np
from numpy.typing import NDArray

from clients.task import Reply, Task
from scenarios.weights import Vector

Work = Callable[[Sequence[Task]], list[Reply]]
Blocks = Sequence[Sequence[Task]]

_ATTEMPTS = 3
"""How often a block is tried before its clients are trained one by one."""
_NOWHERE = np.zeros(0, np.float32)
_IDLE: int | None = None


def available(processes: int) -> int:
    """The setting run.processes, where 0 is one for each core that this process may use."""
    return processes or len(os.sched_getaffinity(0))


class Workers:
    """Up to `count` processes that do `work`; forked at the first blocks, anew where weights change their length."""

    def __init__(self, work: Work, count: int, say: Callable[[str], None]) -> None:
        """say: hears of a worker that died."""
        self._work, self._count, self._say = work, count, say
        self._weights = _NOWHERE
        self._workers: list[_Worker] = []
        weakref.finalize(self, _end, self._workers)

    def close(self) -> None:
        _end(self._workers)

    def map(self, blocks: Blocks) -> Iterator[list[Reply]]:
        """The replies to the tasks of each block, in order. All tasks have the same weights."""
        self._meet(blocks)
        waiting, tries = list(range(len(blocks))), [0] * len(blocks)
        done: dict[int, list[Reply]] = {}
        for i in range(len(blocks)):
            while i not in done:
                for worker in self._workers:
                    if waiting and worker.block is None:
                        at = waiting.pop(0)
                        worker.start(at, blocks[at])
                for worker in _answered(self._workers):
                    at, replies = worker.finish()
                    tries[at] += replies is None
                    if replies is not None:
                        done[at] = replies
                    elif tries[at] < _ATTEMPTS:
                        self._replaced(worker, "in its block, which is trained again")
                        waiting.insert(0, at)
                    else:
                        worker = self._replaced(worker, "in its block, whose clients are trained one by one")
                        done[at] = _summed(self._one_by_one(worker, at, blocks[at]))
            yield done.pop(i)

    def _one_by_one(self, worker: "_Worker", at: int, block: Sequence[Task]) -> Iterator[Reply]:
        """The replies of clients that are trained each alone. It is so rare that other workers may wait for it."""
        for task in block:
            worker.start(at, [task])
            _, replies = worker.finish()
            if replies is None:  # of whom, the lines do not say: under a secret draw they would tell who was drawn
                worker = self._replaced(worker, "with one client alone, which is left out of the round")
            yield from [_lost(task)] if replies is None else replies

    def _meet(self, blocks: Blocks) -> None:
        """Idle workers, as many as have something to do, who see the round's weights."""
        weights = blocks[0][0].weights
        busy = any(worker.block is not None for worker in self._workers)  # a round was left before its end
        if busy or weights.shape != self._weights.shape:
            _end(self._workers)
            self._weights = np.frombuffer(mmap.mmap(-1, max(1, weights.nbytes)), np.float32, weights.size)
        self._weights[:] = weights
        if not self._workers:
            gc.collect()
        while len(self._workers) < min(self._count, len(blocks)):
            self._workers.append(_Worker(self._work, self._weights, len(self._workers) + 1))

    def _replaced(self, worker: "_Worker", what: str) -> "_Worker":
        """Another in the place of one that died."""
        self._say(f"worker {worker.number} died {what}")
        worker.end()
        self._workers[self._workers.index(worker)] = fresh = _Worker(self._work, self._weights, worker.number)
        return fresh


class _Worker:
    """One process, as its parent sees it."""

    def __init__(self, work: Work, weights: Vector, number: int) -> None:
        self.number, self.block = number, _IDLE
        self._total = np.frombuffer(mmap.mmap(-1, max(1, 8 * weights.size)), np.float64, weights.size)
        self.connection, theirs = multiprocessing.Pipe()
        arguments = (work, weights, self._total, theirs, self.connection)
        with warnings.catch_warnings():
            warnings.simplefilter(
                "ignore", DeprecationWarning
            )  # other threads may live: the child touches none's locks
            gc.freeze()  # a collection touches all that it looks at, and what is touched is shared no more
            self._process = multiprocessing.get_context("fork").Process(target=_serve, args=arguments, daemon=True)
            self._process.start()
        theirs.close()

    def start(self, block: int, tasks: Sequence[Task]) -> None:
        self.block = block
        with suppress(OSError):  # dead: `finish` will see it
            self.connection.send([replace(task, weights=_NOWHERE) for task in tasks])

    def finish(self) -> tuple[int, list[Reply] | None]:
        """(the block, its replies; None: the process has died)."""
        block, self.block = self.block, None
        assert block is not None
        try:
            replies: list[Reply] = self.connection.recv()
        except (OSError, EOFError):
            return block, None
        return block, [_with_total(reply, self._total) for reply in replies]

    def end(self) -> None:
        self.connection.close()
        self._process.terminate()
        self._process.join()


def _serve(
    work: Work, weights: Vector, total: NDArray[np.float64], connection: Connection, parents: Connection
) -> None:
    """The child: a block at a time, until the parent is gone."""
    parents.close()  # or the parent's end would live on in here, and its death would not be heard
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C goes to all processes of a terminal; the parent decides
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    held = weights.copy()
    with suppress(EOFError, OSError):
        while True:
            tasks = connection.recv()
            np.copyto(held, weights)
            connection.send([_without_total(reply, total) for reply in work([replace(t, weights=held) for t in tasks])])


def _without_total(reply: Reply, shared: NDArray[np.float64]) -> Reply:
    if reply.summand is None or reply.summand.total is None:
        return reply
    shared[:] = reply.summand.total
    return replace(reply, summand=replace(reply.summand, total=shared[:0]))


def _with_total(reply: Reply, shared: NDArray[np.float64]) -> Reply:
    if reply.summand is None or reply.summand.total is None:
        return reply
    return replace(reply, summand=replace(reply.summand, total=shared.copy()))


def _summed(replies: Iterable[Reply]) -> list[Reply]:
    """`replies`, what sums they have as one, on the last that has one, as of a block that was trained at once."""
    kept, total, whole, last = list[Reply](), np.zeros(0), 0.0, -1
    for reply in replies:
        if (mine := reply.summand) is not None and mine.total is not None:
            total, whole, last = total + mine.total if last >= 0 else mine.total, whole + mine.whole, len(kept)
            reply = replace(reply, summand=replace(mine, total=None, whole=0.0))
        kept.append(reply)
    if last >= 0 and (mine := kept[last].summand) is not None:
        kept[last] = replace(kept[last], summand=replace(mine, total=total, whole=whole))
    return kept


def _answered(workers: Sequence[_Worker]) -> list[_Worker]:
    """Those who have an answer, or have died; waits for one."""
    busy = {worker.connection: worker for worker in workers if worker.block is not None}
    return [busy[connection] for connection in wait(list(busy)) if isinstance(connection, Connection)]


def _lost(task: Task) -> Reply:
    return Reply(task.round, task.client, reason=f"its worker died {_ATTEMPTS} times, then with it alone")


def _end(workers: list[_Worker]) -> None:
    while workers:
        workers.pop().end()
        gc.unfreeze()
