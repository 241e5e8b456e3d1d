"""Running a function in a process of its own: what it gives, how long, how much memory.

A fresh process each time, so that the peak is that function's alone and a crash or a
lack of memory ends nothing else.
"""

from __future__ import annotations

import multiprocessing
import os
import resource
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any


class ApartError(Exception):
    """The function failed, was killed, or took too long."""


@dataclass(frozen=True)
class Apart:
    """What came back. ``seconds``: without the process's start. ``peak``: bytes, resident.

    ``resting``: bytes that were resident before the function began, libraries for the
    most part.
    """

    result: Any
    seconds: float
    peak: int
    resting: int


def apart(function: Callable[..., Any], *arguments: Any, limit: float | None = None) -> Apart:
    """Call the function in a fresh process.

    Args:
        function: one that a module defines; what it takes and gives must be picklable.
            What its module imports counts neither as time nor as the peak's own.
        arguments: its own.
        limit: seconds after which it is ended.

    Raises:
        ApartError: it raised, was killed, or was not done in time.
    """
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe(duplex=False)
    process = context.Process(target=_inside, args=(there, function, arguments))
    process.start()
    there.close()
    try:
        if not here.poll(limit):
            raise ApartError(f"not done in {limit:.0f} s")
        kind, content = here.recv()
    except EOFError:
        process.join()
        raise ApartError(f"ended with exit code {process.exitcode}") from None
    finally:
        process.terminate()  # does nothing to one that has ended
        process.join()
        here.close()
    if kind == "error":
        raise ApartError(content)
    found: Apart = content
    return found


def _end_with_parent() -> None:
    """A caller that was killed can't end what it started: this process does so itself."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _inside(out: Connection, function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    threading.Thread(target=_end_with_parent, daemon=True).start()
    try:
        resting = memory("VmRSS")
        begun = time.monotonic()
        result = function(*arguments)
        seconds = time.monotonic() - begun
        out.send(("ok", Apart(result, seconds, memory("VmHWM"), resting)))
    except BaseException as error:
        out.send(("error", f"{type(error).__name__}: {error}".splitlines()[0]))


def memory(what: str) -> int:
    """Bytes resident in this process: now (``VmRSS``) or at the most (``VmHWM``)."""
    try:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith(f"{what}:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    # Without /proc; after a fork this also counts what the parent held.
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def machine() -> str:
    """The kind of machine, in words that name none."""
    import torch

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    graphics = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    return f"{cores} CPU cores, {torch.get_num_threads()} threads, {graphics}"
