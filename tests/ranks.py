"""Processes that stay and compute together by gloo, for tests of several."""

from __future__ import annotations

import os
import socket
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from typing import Any

import torch
import torch.multiprocessing as multiprocessing

# runs a function of the module level, with the axis of all processes before its arguments, in each
# process; its results, in the order of ranks
Together = Callable[..., list[Any]]


def _work(rank: int, count: int, port: int, pipe: Connection, device: str) -> None:
    torch.set_num_threads(1)
    names = {"RANK": rank, "WORLD_SIZE": count}
    os.environ |= {name: str(value) for name, value in names.items()}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    from worldline.parallel import job

    world = job.join(torch.device(job.own_device(device) or device))
    while (task := pipe.recv()) is not None:
        function, arguments = task
        try:
            outcome = True, function(world, *arguments)
        except BaseException:
            outcome = False, traceback.format_exc()
        pipe.send(outcome)
    job.leave()


@contextmanager
def ranks(count: int, device: str = "cpu") -> Iterator[Together]:
    """Start processes, on "cuda" each with a GPU; they end with the context."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = multiprocessing.get_context("spawn")
    pipes, processes = [], []
    for rank in range(count):
        here, there = context.Pipe()
        arguments = (rank, count, port, there, device)
        process = context.Process(target=_work, args=arguments, daemon=True)
        process.start()
        pipes.append(here)
        processes.append(process)

    def together(function: Callable[..., Any], *arguments: Any) -> list[Any]:
        for pipe in pipes:
            pipe.send((function, arguments))
        outcomes = [pipe.recv() for pipe in pipes]
        for rank, (done, value) in enumerate(outcomes):
            assert done, f"rank {rank}: {value}"
        return [value for _, value in outcomes]

    try:
        yield together
        for pipe in pipes:
            pipe.send(None)
        for process in processes:
            process.join(20)
    finally:
        for process in processes:
            process.kill()
