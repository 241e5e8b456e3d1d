"""What ties a patch to its base and to its requests: digests, a commitment, a salt."""

from __future__ import annotations

import hashlib
import hmac
import os
import re
import secrets
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import BaseMismatchError, ModelError, UsageError
from . import canonical, files
from .manifest import ModuleBase

if TYPE_CHECKING:
    import torch

DTYPES = ("bfloat16", "float16", "float32")
_SALT_BYTES = 32


def module_base(weight: torch.Tensor) -> ModuleBase:
    """The fingerprint of a weight ``[d_out, d_in]`` in the dtype that it is served in.

    Raises:
        ModelError: not a matrix of bfloat16, float16 or float32.
    """
    from ..kernels import column_blocks, column_digests, digest

    name = _dtype_name(weight)
    if name not in DTYPES or weight.ndim != 2 or 0 in weight.shape:
        raise ModelError(
            f"A weight of {name}, shape {tuple(weight.shape)}, can't be patched.",
            "Patches need matrices in bfloat16, float16 or float32, not a quantised model.",
        )
    return ModuleBase.model_validate(
        {
            "shape": tuple(weight.shape),
            "dtype": name,
            "digest": digest(weight),
            "blocks": column_digests(weight, column_blocks(weight.shape[1])),
        }
    )


def check_module(
    name: str, base: ModuleBase, weight: torch.Tensor, start: int = 0, stop: int | None = None
) -> None:
    """Raise unless ``weight`` is the columns ``start:stop`` of the weight that ``base`` names.

    Args:
        name: the module's name, for the message.
        base: from a patch's manifest.
        weight: ``[d_out, stop - start]``, any strides, any device.
        start: first column of the shard.
        stop: column after its last; by default as far as ``weight`` reaches.

    Raises:
        BaseMismatchError: other shape, dtype or values, or a shard whose edges do
            not lie on the borders of the manifest's column blocks.
    """
    from ..kernels import column_digests, digest

    stop = start + weight.shape[-1] if stop is None else stop
    _check_shape(name, base, weight, start, stop)
    _check_dtype(name, base, weight)
    if (start, stop) == (0, base.shape[1]):
        same = digest(weight) == base.digest
    else:
        width = base.shape[1] // len(base.blocks)
        if start % width or stop % width:
            raise BaseMismatchError(
                f"Columns {start} to {stop} of {name} can't be checked:"
                f" its digests are of {len(base.blocks)} blocks of {width} columns.",
                f"Serve with a tensor-parallel size that divides {len(base.blocks)}.",
            )
        found = column_digests(weight, (stop - start) // width)
        same = tuple(found) == base.blocks[start // width : stop // width]
    if not same:
        raise BaseMismatchError(
            f"The weights of {name} are not those that the patch was computed on.",
            "Serve the model that the patch names, in the same revision, or compute it again.",
        )


def _check_shape(name: str, base: ModuleBase, weight: torch.Tensor, start: int, stop: int) -> None:
    d_out, d_in = base.shape
    inside = 0 <= start < stop <= d_in
    if not inside or tuple(weight.shape) != (d_out, stop - start):
        raise BaseMismatchError(
            f"The weight of {name}, {tuple(weight.shape)} for columns {start} to {stop},"
            f" is no part of the {d_out} by {d_in} that the patch was computed on.",
            "Serve the model that the patch names, or compute the patch for this one.",
        )


def _check_dtype(name: str, base: ModuleBase, weight: torch.Tensor) -> None:
    served = _dtype_name(weight)
    if served != base.dtype:
        raise BaseMismatchError(
            f"{name} is served in {served}, the patch was computed for {base.dtype}.",
            f"Serve with --dtype {base.dtype}, or compute the patch with --dtype {served}.",
        )


def _dtype_name(weight: torch.Tensor) -> str:
    return str(weight.dtype).removeprefix("torch.")


def commitment(requests: Sequence[Mapping[str, Any]], salt: bytes) -> str:
    """HMAC-SHA256, in hex, of the requests' canonical JSON under the owner's salt.

    Says nothing about the requests to anyone without the salt; the owner can show
    later what they were. The order of the requests counts.

    Raises:
        ValueError: a request holds what JSON cannot.
    """
    text = canonical.dumps([dict(request) for request in requests])
    return hmac.new(salt, text, hashlib.sha256).hexdigest()


def owner_salt(*, make: bool = True) -> bytes:
    """The owner's secret of 32 bytes, made at the first call unless ``make`` is false.

    It lies, as 64 hex digits, in ``$PATCHER_SALT_FILE`` or ``~/.config/patcher/salt``,
    mode 0600. Several processes may call at once: all get the same.

    Raises:
        UsageError: the file can't be made or read, is malformed, or open to everybody.
    """
    path = Path(os.environ.get("PATCHER_SALT_FILE") or Path.home() / ".config/patcher/salt")
    try:
        if make and not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            files.create(path, secrets.token_hex(_SALT_BYTES).encode() + b"\n")
        text, mode = path.read_bytes(), path.stat().st_mode
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise UsageError(
            f"Can't read or make the salt file {path}: {reason}.",
            "Set PATCHER_SALT_FILE to a place that you can write.",
        ) from None
    if mode & 0o007:
        raise UsageError(f"Everybody can read the salt file {path}.", f"Run: chmod 600 {path}")
    if not re.fullmatch(rb"[0-9a-f]{64}\n?", text):
        raise UsageError(
            f"The salt file {path} does not hold 64 hex digits.",
            "Restore it from a backup, or move it away: a new one is made then.",
        )
    return bytes.fromhex(text.decode())
