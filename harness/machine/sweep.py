"""One function over many jobs: on all cores of this machine, or on a Ray cluster.

A bench gives its parser `cluster_option` and hands the answer to `sweep`: the same command then runs
here or on a cluster.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import itertools
import multiprocessing
import os
import signal
import threading
import traceback
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, Generic, TypeVar

Job = TypeVar("Job")
Result = TypeVar("Result")

ONE_THREAD = dict.fromkeys(
    (
        "OMP_NUM_THREADS",
        "OPENBLAS_NUM_THREADS",
        "MKL_NUM_THREADS",
        "VECLIB_MAXIMUM_THREADS",
        "NUMBA_NUM_THREADS",
    ),
    "1",
)
"""Each core has its worker: a library that starts threads of its own would only be in the way."""
LOCAL_STORE_BYTES = 128 * 2**20
"""Object store of a local Ray cluster: results are rows of a table."""
HANDED_TO_EACH = 2
"""Jobs that a core of a Ray cluster has been given at a time: one to do, one to go on with."""
SHOWN_CHARACTERS = 200
ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("loadgen", "analysis", "harness")


class SweepError(RuntimeError):
    """One job failed, and the sweep stopped.

    ``job`` is the one that failed. ``finished`` holds (job, result) for what was finished and not yet
    handed out, since jobs before it were still under way.
    """

    def __init__(self, message: str, job: object, finished: Sequence[tuple[Any, Any]]) -> None:
        super().__init__(message)
        self.job = job
        self.finished = tuple(finished)


@dataclass(frozen=True, slots=True)
class _Failure:
    """Why a job has no result, and the worker's traceback where there is one."""

    reason: str
    trace: str = ""


@dataclass(frozen=True, slots=True)
class _Outcome(Generic[Result]):
    index: int
    result: Result | _Failure


def cluster_option(parser: argparse.ArgumentParser) -> None:
    """Adds ``--cluster``, to be handed to `sweep`."""
    parser.add_argument(
        "--cluster",
        metavar="WHERE",
        help='run on a Ray cluster: "auto", an address, or "local:2" for two workers on this machine '
        "(without it: all cores of this machine, no Ray)",
    )


def sweep(
    function: Callable[[Job], Result],
    jobs: Iterable[Job],
    *,
    cluster: str | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Iterator[Result]:
    """``function`` of every job, in the order of the jobs, computed in any order.

    Function, jobs and results travel between processes: the function stands at the top of a module or
    script, which starts nothing on import. Each worker computes on one thread.
    ``cluster``: None for one process per core of this machine; "auto" or an address for a Ray cluster,
    to which this package's code is sent; "local:N" for a Ray cluster of N workers that lives as long as
    the sweep. ``progress`` is called with (jobs finished, jobs in all) whenever one has finished.

    Workers end with the iterator: when it is exhausted, closed, or left by an exception such as an
    interrupt; those on the cores of this machine also when this process is killed.

    Raises `SweepError` when a job raises or its process dies, ValueError for a cluster that cannot be
    meant, ModuleNotFoundError where Ray is asked for and not installed.
    """
    listed = list(jobs)
    outcomes = (
        _on_cores(function, listed)
        if cluster is None
        else _on_ray(function, listed, cluster_arguments(cluster), ray_module())
    )
    return _in_order(listed, outcomes, progress)


def _in_order(
    jobs: Sequence[Job],
    outcomes: Generator[_Outcome[Result], None, None],
    progress: Callable[[int, int], None] | None,
) -> Iterator[Result]:
    early: dict[int, Result] = {}
    due = 0
    with contextlib.closing(outcomes):
        for done, outcome in enumerate(outcomes, 1):
            if isinstance(outcome.result, _Failure):
                raise _error(jobs, outcome.index, outcome.result, early)
            early[outcome.index] = outcome.result
            if progress is not None:
                progress(done, len(jobs))
            while due in early:
                yield early.pop(due)
                due += 1


def _error(
    jobs: Sequence[Job], index: int, failure: _Failure, early: dict[int, Result]
) -> SweepError:
    shown = repr(jobs[index])
    if len(shown) > SHOWN_CHARACTERS:
        shown = shown[:SHOWN_CHARACTERS] + "..."
    error = SweepError(
        f"job {index + 1} of {len(jobs)}, {shown}: {failure.reason}",
        jobs[index],
        [(jobs[i], early[i]) for i in sorted(early)],
    )
    if failure.trace:
        error.add_note(failure.trace)
    return error


# ---- the cores of this machine


@dataclass(frozen=True, slots=True)
class _Worker:
    process: multiprocessing.process.BaseProcess
    connection: Connection


def _on_cores(
    function: Callable[[Job], Result], jobs: Sequence[Job]
) -> Generator[_Outcome[Result], None, None]:
    """Outcomes as they come. A pipe for each worker, so that one that dies is known with its job."""
    todo = iter(range(len(jobs)))
    workers: list[_Worker] = []
    busy: dict[Connection, tuple[_Worker, int]] = {}

    def give(worker: _Worker) -> None:
        index = next(todo, None)
        if index is not None:
            busy[worker.connection] = worker, index
            # A worker that died is noticed when its answer is read.
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                worker.connection.send(jobs[index])

    try:
        with _one_thread_each(), _interrupts_wait():
            for _ in range(min(_cores(), len(jobs))):
                workers.append(_start(function))
        for worker in workers:
            give(worker)
        while busy:
            ready = wait(list(busy))
            for connection in [c for c in busy if c in ready]:
                worker, index = busy.pop(connection)
                yield _Outcome(index, _answer(worker))
                give(worker)
    finally:
        for worker in workers:
            worker.process.kill()
        for worker in workers:
            worker.process.join()
            worker.connection.close()


def _start(function: Callable[[Any], Any]) -> _Worker:
    # Spawned: a fork would keep this process's threads' locks, and the threads of its libraries.
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    process = context.Process(target=_work, args=(there, function), daemon=True)
    process.start()
    there.close()
    return _Worker(process, here)


def _answer(worker: _Worker) -> Any:
    try:
        return worker.connection.recv()
    except (EOFError, ConnectionResetError):
        worker.process.join()
        return _Failure(f"its process ended by itself, exit code {worker.process.exitcode}")


def _work(connection: Connection, function: Callable[[Any], Any]) -> None:
    """Life of a worker: a job in, its result or `_Failure` out, until it is killed."""
    threading.Thread(target=_end_with_parent, daemon=True).start()
    while True:
        try:
            connection.send(_attempt(function, connection.recv()))
        except Exception as error:
            # The job cannot be read here, or its result cannot be sent.
            connection.send(_failure(error))


def _attempt(function: Callable[[Any], Any], job: Any) -> Any:
    try:
        return function(job)
    except Exception as error:
        return _failure(error)


def _failure(error: Exception) -> _Failure:
    return _Failure(f"{type(error).__name__}: {error}", traceback.format_exc())


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


@contextlib.contextmanager
def _one_thread_each() -> Iterator[None]:
    """Processes started inside compute on one thread each."""
    before = {name: os.environ.get(name) for name in ONE_THREAD}
    os.environ.update(ONE_THREAD)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


@contextlib.contextmanager
def _interrupts_wait() -> Iterator[None]:
    """Processes started inside leave interrupts to this one, to which they come when all are started.

    A blocked signal is inherited, from a process's first instruction on.
    """
    # It starts with the first spawned process otherwise, and then unblocks the signal.
    resource_tracker.ensure_running()
    blocked = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, blocked)


def _cores() -> int:
    """Cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


# ---- a Ray cluster


def ray_module() -> Any:
    """Ray. Raises ModuleNotFoundError, with what to install."""
    try:
        return importlib.import_module("ray")
    except ModuleNotFoundError as error:
        if error.name != "ray":
            raise
        raise ModuleNotFoundError(
            "a cluster needs Ray, which is not installed: pip install 'critrate[ray]'",
            name="ray",
        ) from error


def cluster_arguments(cluster: str) -> dict[str, Any]:
    """Arguments of `ray.init` for an answer to ``--cluster``. Raises ValueError for a senseless one."""
    kind, _, count = cluster.partition(":")
    if kind != "local":
        modules = [str(ROOT / name) for name in PACKAGES]
        return {
            "address": cluster,
            "runtime_env": {"env_vars": ONE_THREAD, "py_modules": modules},
        }
    if not count.isdecimal() or int(count) < 1:
        raise ValueError(f'cluster {cluster!r}: say how many workers, such as "local:2"')
    return {
        # Without it, Ray would join a cluster that it finds.
        "address": "local",
        "num_cpus": int(count),
        "object_store_memory": LOCAL_STORE_BYTES,
        "include_dashboard": False,
    }


def _on_ray(
    function: Callable[[Job], Result], jobs: Sequence[Job], arguments: dict[str, Any], ray: Any
) -> Generator[_Outcome[Result], None, None]:
    """Outcomes as they come. Few jobs are handed over at a time: waiting costs time for each of them."""
    try:
        join_cluster(ray, arguments)
        attempt = ray.remote(num_cpus=1)(_attempt)
        shared = ray.put(function)
        todo = iter(range(len(jobs)))
        under_way: dict[Any, int] = {}
        while True:
            room = HANDED_TO_EACH * int(ray.cluster_resources().get("CPU", 1)) - len(under_way)
            for index in itertools.islice(todo, max(room, 0)):
                under_way[attempt.remote(shared, jobs[index])] = index
            if not under_way:
                return
            for answer in ray.wait(list(under_way))[0]:
                yield _Outcome(under_way.pop(answer), _ray_answer(ray, answer))
    finally:
        ray.shutdown()


def join_cluster(ray: Any, arguments: dict[str, Any]) -> None:
    """Join the cluster, or start the local one, whose workers compute on one thread each."""
    # Ray reports its use to its makers unless told otherwise.
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    with _one_thread_each():
        ray.init(logging_level="error", log_to_driver=False, **arguments)


def _ray_answer(ray: Any, answer: Any) -> Any:
    try:
        return ray.get(answer)
    except ray.exceptions.RayError as error:
        return _Failure(f"{type(error).__name__}: {error}")
