"""Where every error of the command ends: words on stderr, an exit code, a JSON document."""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

import click

from patcher.cli.output import lines, note, note_error, print_json
from patcher.errors import PatcherError, UsageError

INTERRUPTED = 128 + 2  # as shells report SIGINT
PIPE_CLOSED = 128 + 13  # and SIGPIPE


def guarded(
    run: Callable[..., Any], words: Sequence[str] | None, *args: Any, **options: Any
) -> Any:
    """Run click's ``main`` and exit with the code of what happened.

    Without ``standalone_mode`` errors go through, as click has it.
    """
    if not options.get("standalone_mode", True):
        return run(*args, **options)
    words = list(sys.argv[1:] if words is None else words)
    own = words[: words.index("--")] if "--" in words else words
    try:
        code = run(*args, **{**options, "standalone_mode": False})
        sys.stdout.flush()
    except (click.Abort, KeyboardInterrupt):
        _end(INTERRUPTED, lambda: note("Interrupted."))
    except BrokenPipeError:
        close_quietly()
    except Exception as error:
        debug = "--debug" in own or os.environ.get("PATCHER_DEBUG", "") not in ("", "0")
        ours = _as_ours(error)
        _end(ours.exit_code, lambda: _report(ours, as_json="--json" in own, debug=debug))
    sys.exit(code if isinstance(code, int) else 0)


def close_quietly() -> NoReturn:
    """Exit as a closed pipe asks: whoever read our output has gone, nobody is left to tell."""
    _silence()
    sys.exit(PIPE_CLOSED)


def _end(code: int, tell: Callable[[], None]) -> NoReturn:
    """Tell how it ended and exit with ``code``, even where there is no room to tell it."""
    try:
        tell()
        sys.stdout.flush()
    except BrokenPipeError:
        close_quietly()
    except OSError:
        _silence()
    sys.exit(code)


def _silence() -> None:
    # What Python still holds it would try to write once more at its end, and exit with 120.
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for stream in (sys.stdout, sys.stderr):
        os.dup2(nowhere, stream.fileno())


def _report(error: PatcherError, *, as_json: bool, debug: bool) -> None:
    if debug:
        traceback.print_exc()
    note_error(error)
    if as_json:
        document = {
            "code": error.code,
            "message": lines(error.message),
            "cure": lines(error.cure),
        }
        print_json({"error": {**error.details, **document, "exit_code": error.exit_code}})


def _as_ours(error: Exception) -> PatcherError:
    if isinstance(error, PatcherError):
        return error
    if isinstance(error, click.ClickException):
        return _usage(error)
    if isinstance(error, ModuleNotFoundError) and error.name in ("torch", "transformers", "vllm"):
        return UsageError(
            f"{error.name} is not installed.",
            "Install what computes and serves: pip install 'vllm-patcher[engine]' (or [compute]).",
        )
    if isinstance(error, OSError) and error.strerror:
        where = f": {error.filename}" if error.filename else ""
        wrong_path = (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError)
        kind = UsageError if isinstance(error, wrong_path) else PatcherError
        return kind(f"{error.strerror}{where}.")
    # Not the exception's own words: they might quote the forget set.
    return PatcherError(
        f"A defect in patcher: {type(error).__name__} at {_origin(error)}.",
        "PATCHER_DEBUG=1 shows all of it; please report it.",
    )


def _usage(error: click.ClickException) -> UsageError:
    context = getattr(error, "ctx", None)
    cure = f"`{context.command_path} -h` shows how." if context else ""
    return UsageError(error.format_message(), cure)


def _origin(error: Exception) -> str:
    frames = traceback.extract_tb(error.__traceback__)
    last = frames[-1] if frames else None
    return f"{Path(last.filename).name}:{last.lineno}" if last else "an unknown place"
