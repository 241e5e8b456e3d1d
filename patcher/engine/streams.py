"""Work on a GPU beside the model's own: a stream of its own, and a wait for that work alone."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def side_stream(device: torch.device) -> Iterator[None]:
    """What is launched inside runs on a stream of its own, after what was launched before.

    Left when all of it is done; streams that others use are not waited for. On a device without
    streams it does nothing.
    """
    if device.type != "cuda":
        yield
        return
    stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        yield
    done: torch.cuda.Event = stream.record_event()
    done.synchronize()
