"""Processes that train blocks of clients: forked from the run's own, so that they share its data and need no start.

A block comes out the same in whichever process it is trained. The weights, and sums of large blocks that come back, lie
in memory that both sides share; the rest travels by pipe, small blocks several at a time. A worker that dies is named,
and another trains its blocks again, with the same batches; noise is drawn anew. A block that ends three of them is
trained client by client, and who ends a worker alone is left out of the round. Its sum is then that of these updates,
in the order of the tasks.

Legend: P is the number of weights.
"""

import gc
import io
import mmap
import multiprocessing
import os
import pickle
import signal
import warnings
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from multiprocessing.connection import Connection, wait
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from clients.task import Reply, Task
from scenarios.weights import Vector

Room = NDArray[np.float64]
"""(P,) where a block's sum may lie; what stood there before is of no use."""
Work = Callable[[Sequence[Task], Room | None], list[Reply]]
"""(the tasks of a block, room for its sum; None: anywhere) -> a reply to each."""
Blocks = Sequence[Sequence[Task]]

_ATTEMPTS = 3
"""How often a block is tried before its clients are trained one by one."""
_NOWHERE = np.zeros(0, np.float32)
_AT_ONCE = 1 << 20
"""Bytes of updates that blocks of one message may come to, where it is not one block alone."""


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
        """The replies to the tasks of each block, in order. All tasks have the same weights.

        A block's sum lies where its worker put it, and stands there until the next block is asked for.
        """
        self._meet(blocks)
        waiting, tries = list(range(len(blocks))), [0] * len(blocks)
        done: dict[int, list[Reply]] = {}
        for i in range(len(blocks)):
            while i not in done:
                for worker in self._workers:
                    if waiting and not worker.blocks:
                        if worker.last in done:  # its sum would be written over
                            done[worker.last] = [_kept(reply) for reply in done[worker.last]]
                        count = 1 if tries[waiting[0]] else self._together(blocks, len(waiting))
                        some, waiting = waiting[:count], waiting[count:]
                        worker.start(some, [blocks[at] for at in some])
                for worker in _answered(self._workers):
                    some, answers = worker.finish()
                    if answers is not None:
                        done |= zip(some, answers, strict=True)
                        continue
                    for at in some:
                        tries[at] += 1
                    if tries[some[0]] < _ATTEMPTS:  # from the second time on a block goes by itself
                        self._replaced(
                            worker, f"in its block{', which is' if len(some) == 1 else 's, which are'} trained again"
                        )
                        waiting[:0] = some
                    else:
                        worker = self._replaced(worker, "in its block, whose clients are trained one by one")
                        done[some[0]] = _summed(self._one_by_one(worker, some[0], blocks[some[0]]))
            yield done.pop(i)

    def _together(self, blocks: Blocks, waiting: int) -> int:
        """How many of the blocks that wait go in one message: fewer towards the end, so that all workers end alike."""
        most = _AT_ONCE // max(1, 8 * self._weights.size * max(map(len, blocks)))
        return max(1, min(most, waiting // (2 * len(self._workers))))

    def _one_by_one(self, worker: "_Worker", at: int, block: Sequence[Task]) -> Iterator[Reply]:
        """The replies of clients that are trained each alone. It is so rare that other workers may wait for it."""
        for task in block:
            worker.start([at], [[task]])
            _, answers = worker.finish()
            if answers is None:  # of whom, the lines do not say: under a secret draw they would tell who was drawn
                worker = self._replaced(worker, "with one client alone, which is left out of the round")
            yield from [_lost(task)] if answers is None else map(_kept, answers[0])

    def _meet(self, blocks: Blocks) -> None:
        """Idle workers, as many as have something to do, who see the round's weights."""
        weights = blocks[0][0].weights
        busy = any(worker.blocks for worker in self._workers)  # a round was left before its end
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
        self.number, self.blocks = number, list[int]()
        self.last: int | None = None
        """The block whose sum lies in the memory that both see."""
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

    def start(self, numbers: list[int], blocks: Blocks) -> None:
        self.blocks = numbers
        with suppress(OSError):  # dead: `finish` will see it
            self.connection.send_bytes(_packed(blocks))

    def finish(self) -> tuple[list[int], list[list[Reply]] | None]:
        """(the blocks, their replies; None: the process has died)."""
        numbers, self.blocks = self.blocks, []
        self.last = numbers[0] if len(numbers) == 1 else None
        try:
            answers: list[list[Reply]] = self.connection.recv()
        except (OSError, EOFError):
            return numbers, None
        if len(answers) == 1:
            answers = [[_with_total(reply, self._total) for reply in answers[0]]]
        return numbers, answers

    def end(self) -> None:
        self.connection.close()
        self._process.terminate()
        self._process.join()


def _serve(work: Work, weights: Vector, total: Room, connection: Connection, parents: Connection) -> None:
    """The child: what it is given, until the parent is gone."""
    parents.close()  # or the parent's end would live on in here, and its death would not be heard
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C goes to all processes of a terminal; the parent decides
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    held = weights.copy()
    with suppress(EOFError, OSError):
        while True:
            packed = connection.recv_bytes()
            np.copyto(held, weights)
            blocks = _Unpacking(io.BytesIO(packed), held).load()
            room = total if len(blocks) == 1 else None  # sums of several go by pipe
            answers = [work(tasks, room) for tasks in blocks]
            if room is not None:
                answers = [[_without_total(reply, room) for reply in answers[0]]]
            connection.send(answers)


class _Packing(pickle.Pickler):
    """Tasks without the weights, which the other side has; all have the same."""

    def __init__(self, file: IO[bytes], weights: Vector) -> None:
        super().__init__(file, pickle.HIGHEST_PROTOCOL)
        self._weights = weights

    def reducer_override(self, one: object) -> Any:
        return (_weights, ()) if one is self._weights else NotImplemented


class _Unpacking(pickle.Unpickler):
    def __init__(self, file: IO[bytes], weights: Vector) -> None:
        super().__init__(file)
        self._weights = weights

    def find_class(self, module: str, name: str) -> Any:
        return (lambda: self._weights) if name == _weights.__name__ else super().find_class(module, name)


def _weights() -> Vector:
    """Stands in a message for the weights that the other side puts in its place."""
    raise NotImplementedError


def _packed(blocks: Blocks) -> memoryview:
    file = io.BytesIO()
    _Packing(file, blocks[0][0].weights).dump(blocks)
    return file.getbuffer()


def _without_total(reply: Reply, shared: Room) -> Reply:
    if reply.summand is None or reply.summand.total is None:
        return reply
    if reply.summand.total is not shared:
        shared[:] = reply.summand.total
    return replace(reply, summand=replace(reply.summand, total=shared[:0]))


def _with_total(reply: Reply, shared: Room) -> Reply:
    if reply.summand is None or reply.summand.total is None:
        return reply
    return replace(reply, summand=replace(reply.summand, total=shared))


def _kept(reply: Reply) -> Reply:
    if reply.summand is None or reply.summand.total is None:
        return reply
    return _with_total(reply, reply.summand.total.copy())


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
    busy = {worker.connection: worker for worker in workers if worker.blocks}
    return [busy[connection] for connection in wait(list(busy)) if isinstance(connection, Connection)]


def _lost(task: Task) -> Reply:
    return Reply(task.round, task.client, reason=f"its worker died {_ATTEMPTS} times, then with it alone")


def _end(workers: list[_Worker]) -> None:
    while workers:
        workers.pop().end()
        gc.unfreeze()
