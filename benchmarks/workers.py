"""Jobs in processes of their own, several at a time, each ended when it takes too long."""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from multiprocessing.connection import Connection
from queue import SimpleQueue
from typing import Any, TypeVar

Job = TypeVar("Job")


class Worker:
    """A process that calls ``function``, one job after the other; it begins anew after one that failed."""

    def __init__(self, function: Callable[[Any], Any]) -> None:
        self._function = function
        self._process: Any = None
        self._connection: Any = None

    def __call__(self, job: Any, patience: float) -> Any:
        """The result.

        Raises:
            TimeoutError: there is none after so many seconds.
            EOFError: the process ended; it has said why.
        """
        if self._process is None:
            context = multiprocessing.get_context("spawn")
            self._connection, there = context.Pipe()
            self._process = context.Process(target=_serve, args=(self._function, there), daemon=True)
            self._process.start()
            there.close()
        try:
            self._connection.send(job)
            if not self._connection.poll(patience):
                raise TimeoutError
            return self._connection.recv()
        except OSError as error:  # TimeoutError is one, and so is a broken pipe
            self.stop(patience=0)
            raise error if isinstance(error, TimeoutError) else EOFError from None
        except EOFError:
            self.stop(patience=0)
            raise

    def stop(self, patience: float) -> None:
        """End the process: without a connection it ends by itself, if it is not at work."""
        if self._process is not None:
            self._connection.close()
            self._process.join(patience)
            self._process.kill()
            self._process.join()
            self._process = None


def _serve(function: Callable[[Any], Any], connection: Connection) -> None:
    while True:
        try:
            job = connection.recv()
        except EOFError:
            return
        connection.send(function(job))


def run_jobs(
    function: Callable[[Job], Any], jobs: Sequence[Job], count: int, patience: float, seconds: float
) -> Iterator[tuple[Job, Any]]:
    """Each job and its result as they are ready; in place of a result, the error of one that has none.

    Args:
        function: of a module, or a partial call of such a one.
        jobs: begun in this order.
        count: how many run at a time.
        patience: seconds that a job may take.
        seconds: those that all together may take; what has not begun by then has a TimeoutError.
    """
    end = time.perf_counter() + seconds
    workers = [Worker(function) for _ in range(count)]
    idle: SimpleQueue[Worker] = SimpleQueue()
    for worker in workers:
        idle.put(worker)

    def run(job: Job) -> Any:
        left = min(patience, end - time.perf_counter())
        if left <= 0:
            raise TimeoutError
        worker = idle.get()
        try:
            return worker(job, left)
        finally:
            idle.put(worker)

    try:
        with ThreadPoolExecutor(count) as pool:
            futures = {pool.submit(run, job): job for job in jobs}
            for future in as_completed(futures):
                yield futures[future], future.exception() or future.result()
    finally:
        for worker in workers:
            worker.stop(patience=5)
