"""Real processes with gloo on loopback.

They are started once for a number of ranks, get one function after another, and end with the tests.

Every rank runs the function, with its rank and the arguments, and returns what the test asserts.
The function must be importable (`spawn`). An error in a rank, or a rank that does not answer, ends
all of them and fails the test; the next test starts new ones.
"""

from __future__ import annotations

import socket
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

TIMEOUT = 180
"""Seconds a function may take, and a collective in it."""


def _serve(rank: int, world: int, port: int, jobs: Connection) -> None:
    torch.set_num_threads(1)
    store = dist.TCPStore(
        "127.0.0.1", port, world, is_master=rank == 0, timeout=timedelta(seconds=TIMEOUT)
    )
    dist.init_process_group(
        "gloo",
        store=store,
        rank=rank,
        world_size=world,
        timeout=timedelta(seconds=TIMEOUT),
    )
    jobs.send((None, None))
    while (job := jobs.recv()) is not None:
        function, args = job
        torch.manual_seed(0)
        try:
            jobs.send((function(rank, *args), None))
        except BaseException:
            jobs.send((None, traceback.format_exc()))
    dist.destroy_process_group()


def _free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


class Ranks:
    """`world` processes; `run` gives them a function and returns what each of them returned."""

    def __init__(self, world: int) -> None:
        self.world = world
        self.processes: list[Any] = []
        self.jobs: list[Connection] = []

    def _start(self) -> None:
        spawn, port = mp.get_context("spawn"), _free_port()
        for rank in range(self.world):
            mine, theirs = spawn.Pipe()
            process = spawn.Process(
                target=_serve, args=(rank, self.world, port, theirs), daemon=True
            )
            process.start()
            theirs.close()
            self.jobs.append(mine)
            self.processes.append(process)
        self._answers("start", TIMEOUT)

    def run(
        self, function: Callable[..., Any], *args: Any, timeout: float = TIMEOUT
    ) -> list[Any]:
        """``function(rank, *args)`` of every rank, in order of rank."""
        if not self.processes:
            self._start()
        for jobs in self.jobs:
            jobs.send((function, args))
        return self._answers(function.__name__, timeout)

    def _answers(self, name: str, timeout: float) -> list[Any]:
        results: dict[int, Any] = {}
        deadline = time.monotonic() + timeout
        try:
            while len(results) < self.world:
                missing = [rank for rank in range(self.world) if rank not in results]
                answered = wait(
                    [self.jobs[rank] for rank in missing],
                    max(0, deadline - time.monotonic()),
                )
                if not answered:
                    raise AssertionError(
                        f"{name}: no answer from ranks {missing} in {timeout} s"
                    )
                for rank in missing:
                    if self.jobs[rank] in answered:
                        try:
                            results[rank], error = self.jobs[rank].recv()
                        except EOFError:
                            error = f"rank {rank} has died"
                        if error:
                            raise AssertionError(
                                f"{name}, rank {rank} of {self.world}:\n{error}"
                            )
        except BaseException:
            self.end()
            raise
        return [results[rank] for rank in range(self.world)]

    def stop(self) -> None:
        """Let them end by themselves."""
        for jobs in self.jobs:
            with suppress(OSError):
                jobs.send(None)
        for process in self.processes:
            process.join(10)
        self.end()

    def end(self) -> None:
        """End whoever is left."""
        for process in self.processes:
            process.kill()
            process.join()
        for jobs in self.jobs:
            jobs.close()
        self.processes, self.jobs = [], []
