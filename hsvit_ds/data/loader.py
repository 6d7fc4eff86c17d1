"""Worker processes that answer jobs in order, ahead of time, and are replaced when they die.

PyTorch's DataLoader does the work, with two things of ours around it. It runs in a thread, since in the main thread it
installs a signal handler that throws into whatever is running there (a collective, say) when a worker dies. And its
workers come from a fork server: a fork of a rank would copy the locks of gloo's, NCCL's and MLflow's threads.
"""

from __future__ import annotations

import multiprocessing
import os
import queue
import signal
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from multiprocessing import connection, resource_tracker
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset, get_worker_info

from ..errors import RefusedError, counted, first_line, warn
from .batch import Images

Answer = Callable[[Any], Images]
SHARED = "/dev/shm"
MORE = (
    "give the container more (docker run --shm-size=8g), or set data.workers, run.micro_batch or data.eval_batch lower"
)
READY = 2
"""Answers that a worker holds ready: PyTorch's prefetch_factor."""
RESTARTS = 3
"""Times that workers may die in a row without an answer in between."""


class Loader:
    """The images of one forward after the other.

    Args:
        start: gives an iterator of the answers from the n-th on. workers: processes that `start` uses; 0: each answer
        is computed when it is asked for.
    """

    def __init__(self, start: Callable[[int], Iterable[Images]], workers: int) -> None:
        self._start, self._workers = start, workers
        self._stopped = threading.Event()
        self._answers: queue.Queue[Images | BaseException | None] = queue.Queue(maxsize=1)
        self._thread: threading.Thread | None = None
        self.idle: Callable[[], None] = lambda: None
        """Called again and again while an answer does not come; may raise."""

    def __iter__(self) -> Iterator[Images]:
        if not self._workers:
            yield from map(_checked, self._start(0))
            return
        self._thread = threading.Thread(target=self._pump, daemon=True)
        self._thread.start()
        while (answer := self._wait()) is not None:
            if isinstance(answer, BaseException):
                raise answer
            yield _checked(answer)

    def _wait(self) -> Images | BaseException | None:
        while True:
            try:
                return self._answers.get(timeout=0.5)
            except queue.Empty:
                self.idle()

    def close(self) -> None:
        """End the workers."""
        self._stopped.set()
        if self._thread is None:
            return
        self._thread.join(timeout=10)
        if self._thread.is_alive():  # it waits for a worker that waits for a disk or a server; Python would, at its end
            for worker in multiprocessing.active_children():
                worker.kill()

    def _pump(self) -> None:
        """In the thread."""
        # Ctrl-C goes to all processes of a terminal's group; those that are started here inherit this, and leave it to
        # the rank. Starting the tracker, which they need, would unblock it again.
        resource_tracker.ensure_running()
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        done = deaths = 0
        try:
            while not self._stopped.is_set():
                try:
                    for answer in self._start(done):
                        if not self._hand_over(answer):
                            return
                        done, deaths = done + 1, 0
                    break
                except (RuntimeError, OSError, EOFError) as error:
                    if not _is_death(error):
                        raise
                    deaths += 1
                    if deaths > RESTARTS:
                        raise RefusedError(
                            f"the data workers died {counted(deaths, 'time')} in a row ({first_line(error)}): out of "
                            "memory, or /dev/shm is too small? Set data.workers lower"
                        ) from None
                    why = first_line(error)
                    warn(f"a data worker died ({why}); all start anew")
            self._hand_over(None)
        except BaseException as error:
            self._hand_over(error)

    def _hand_over(self, answer: Images | BaseException | None) -> bool:
        while not self._stopped.is_set():
            try:
                self._answers.put(answer, timeout=0.1)
                return True
            except queue.Full:
                continue
        return False


def _is_death(error: Exception) -> bool:
    """Whether a worker died: one that dies while it hands over an answer breaks a connection first, and what it raises
    itself begins with "Caught"."""
    if isinstance(error, RuntimeError):
        return "exited unexpectedly" in str(error)
    return not str(error).startswith("Caught")


def answers(answer: Answer, jobs: Callable[[int], Iterator[Any]], workers: int, pin: bool) -> Loader:
    """A loader of the answers to jobs, in their order.

    Args:
        answer: computes one; pickled into the workers. jobs: gives the jobs from the n-th on. pin: into pinned memory.
    """

    def start(first: int) -> DataLoader[Images]:
        return data_loader(_Answers(answer), workers, pin, sampler=_From(jobs, first))

    return Loader(start, workers)


class Again:
    """The answers to the same few jobs, again and again, by workers that wait in between. Arguments as of `answers`."""

    def __init__(self, answer: Answer, jobs: Sequence[Any], workers: int, pin: bool) -> None:
        self._answer, self._jobs, self._workers, self._pin = answer, jobs, workers, pin
        self._waiting: DataLoader[Images] | None = None

    def once(self) -> Loader:
        return Loader(self._from, self._workers)

    def _from(self, first: int) -> Iterator[Images]:
        there, self._waiting = self._waiting, None  # one that does not end well is not asked again
        if first or there is None:
            jobs = self._jobs[first:]
            there = data_loader(
                _Answers(self._answer), self._workers, self._pin, sampler=jobs, persistent_workers=self._workers > 0
            )
        yield from there
        if not first:
            self._waiting = there

    def close(self) -> None:
        """End the workers."""
        self._waiting = None


def preload(modules: Sequence[str]) -> None:
    """Have the fork server import what the workers will use: once, instead of once for each of them."""
    multiprocessing.get_context("forkserver").set_forkserver_preload([__name__, *modules])


def data_loader(dataset: Dataset[Images], workers: int, pin: bool, **more: Any) -> DataLoader[Images]:
    """PyTorch's DataLoader of whole batches."""
    processes: dict[str, Any] = {}
    if workers:
        context = multiprocessing.get_context("forkserver")
        processes = {"num_workers": workers, "multiprocessing_context": context, "worker_init_fn": _watch_the_rank}
    return DataLoader(dataset, batch_size=None, collate_fn=_shared, pin_memory=pin, **processes, **more)


class _Answers(Dataset[Images]):
    def __init__(self, answer: Answer) -> None:
        self.answer = answer

    def __getitem__(self, job: Any) -> Images:
        try:
            return self.answer(job)
        except RefusedError as error:  # raised across processes it would carry the worker's stack trace
            nothing = torch.empty(0)
            return Images(nothing, nothing, nothing, [], refused=str(error))


class _From:
    def __init__(self, jobs: Callable[[int], Iterator[Any]], first: int) -> None:
        self.jobs, self.first = jobs, first

    def __iter__(self) -> Iterator[Any]:
        return self.jobs(self.first)


def _shared(answer: Any) -> Any:
    """In a worker: `Images` in shared memory, from where the rank takes them. PyTorch would do it in a thread of its
    own, which fails without a word to the rank where the memory is full, and the rank would wait for ever."""
    if get_worker_info() is None:
        return answer
    try:
        for part in answer[:3]:
            part.share_memory_()
    except RuntimeError as error:
        nothing = torch.empty(0)
        return Images(nothing, nothing, nothing, [], refused=f"a data worker: {first_line(error)}; {MORE}")
    return answer


def check_shared_memory(needed: int) -> None:
    """Refuse to start where the answers that workers hold ready do not fit. needed: bytes, of all ranks of the host."""
    try:
        found = os.statvfs(SHARED)
    except OSError:  # not Linux
        return
    if needed > (free := found.f_bavail * found.f_frsize):
        raise RefusedError(
            f"{SHARED} has {free / 2**20:,.0f} MiB free, but the batches that the data workers hold ready take "
            f"{needed / 2**20:,.0f} MiB; {MORE}"
        )


def _checked(answer: Images) -> Images:
    if answer.refused:
        raise RefusedError(answer.refused)
    return answer


def _watch_the_rank(_worker: int) -> None:
    """In a worker: end with the rank. PyTorch watches the parent process, which here is the fork server."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # launchers send it to workers too, whose rank is still to save
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        connection.wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
