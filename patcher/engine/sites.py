"""Where a rank's part of a target module serves, and a new weight ready beside it."""

from __future__ import annotations

import functools
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

import torch

from patcher.engine.streams import side_stream
from patcher.kernels import LowRank, checksum, fold

_PROBES = 16  # vectors that a pack is asked with whether it is still the same
_READ_ROWS = 256  # input columns read back from a pack in one product


class Staged(Protocol):
    """A new weight, ready beside the live one."""

    def commit(self) -> None:
        """Put it in the live one's place, and hold that."""

    def undo(self) -> None:
        """Put back what was live before :meth:`commit`, wherever that one stopped."""

    def read(self) -> torch.Tensor:
        """What is held beside the live weight now, ``[d_out, columns]``."""

    def checksum(self) -> int:
        """The site's :meth:`Site.checksum` once this is live."""


class Columns(NamedTuple):
    """One rank's part of a target module: ``W[:, start:stop]`` of a ``[d_out, d_in]`` weight."""

    start: int
    stop: int
    d_in: int


class Site(Protocol):
    """The place where one rank's part of a target module serves."""

    columns: Columns

    def base(self) -> torch.Tensor:
        """The weight that serves where nothing was patched yet, ``[d_out, stop - start]``."""

    def made(self, base: torch.Tensor, deltas: Sequence[LowRank]) -> torch.Tensor:
        """What is to serve under ``deltas``, in the form of :meth:`read`.

        Raises :class:`EngineRefusedError` for deltas that can't act here.
        """

    def read(self) -> torch.Tensor:
        """What truly serves, on the host: the weight, and what else acts on the output."""

    def checksum(self) -> int:
        """A number that is another, but by rare accident, once something else serves."""

    def stage(self, weight: torch.Tensor) -> Staged:
        """Prepare ``weight`` (host, live dtype, as :meth:`made`) beside the live one."""


class Folded(ABC):
    """What the sites have in common whose patches are folded into the weight."""

    device = torch.device("cpu")  # where folding is quickest: where the weight is

    @abstractmethod
    def read(self) -> torch.Tensor:
        """As in :class:`Site`."""

    def base(self) -> torch.Tensor:
        """The live weight."""
        return self.read()

    def checksum(self) -> int:
        """Of the live weight."""
        return checksum(self.read())

    def made(self, base: torch.Tensor, deltas: Sequence[LowRank]) -> torch.Tensor:
        """The fold, computed on the device, from and into the host's memory."""
        with side_stream(self.device):
            return fold(base, deltas, device=self.device)


def read_product(
    product: Callable[[torch.Tensor], torch.Tensor], shape: tuple[int, int], dtype: torch.dtype
) -> torch.Tensor:
    """Multiply unit vectors by a pack: one term is the weight, the rest are 0, so it is exact."""
    d_out, d_in = shape
    out = torch.empty(d_out, d_in, dtype=dtype)
    for start in range(0, d_in, _READ_ROWS):
        stop = min(start + _READ_ROWS, d_in)
        units = torch.zeros(stop - start, d_in, dtype=dtype)
        units[:, start:stop].fill_diagonal_(1)
        out[:, start:stop] = product(units).t()
    return out


def probe_product(
    product: Callable[[torch.Tensor], torch.Tensor], d_in: int, dtype: torch.dtype
) -> int:
    """The checksum of a pack's products with a few vectors, always the same ones.

    For a weight that takes as many products as it has columns to be read. Other weights give
    other products; what is lost in their rounding, a bit that flipped here or there, is for
    :func:`read_product` to find.
    """
    return checksum(product(_probes(d_in, dtype)))


@functools.lru_cache(maxsize=8)
def _probes(d_in: int, dtype: torch.dtype) -> torch.Tensor:
    draw = torch.Generator().manual_seed(0)
    return torch.randn(_PROBES, d_in, generator=draw).to(dtype)


class TensorStaged:
    """A weight to be copied into a live tensor; ``unpack`` gives the matrix that either holds."""

    def __init__(
        self,
        live: torch.Tensor,
        weight: torch.Tensor,
        unpack: Callable[[torch.Tensor], torch.Tensor] = torch.clone,
    ) -> None:
        self._live = live
        # Host memory: the device's is vLLM's, to the last block of its KV cache.
        self._spare = weight.pin_memory() if live.is_cuda else weight.clone()
        self._held = torch.empty_like(self._spare, pin_memory=live.is_cuda)
        self._holds = False
        self._unpack = unpack

    def commit(self) -> None:
        """Keep the live values on the host, and write the new ones."""
        self._held.copy_(self._live)
        self._holds = True
        self._write(self._spare)

    def undo(self) -> None:
        """Write the values of before."""
        if self._holds:
            self._write(self._held)
            self._holds = False

    def _write(self, weight: torch.Tensor) -> None:
        with side_stream(self._live.device):
            self._live.copy_(weight, non_blocking=True)

    def read(self) -> torch.Tensor:
        """The new weight, ``[d_out, columns]``."""
        return self._unpack(self._spare)

    def checksum(self) -> int:
        """Of the new weight."""
        return checksum(self.read())
