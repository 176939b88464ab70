"""Terminal behaviour shared by all commands: encoding, closed pipes, other libraries' output, error messages."""

from __future__ import annotations

import codecs
import contextlib
import io
import logging
import os
import sys
import warnings
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, TextIO

from .._encoding import encodes

if TYPE_CHECKING:
    from rich.console import Console

__all__ = [
    "INTERRUPTED",
    "PIPE_CLOSED",
    "console",
    "plus_minus",
    "quiet",
    "readable",
    "sentence",
    "stop_writing",
]

#: Exit status after Ctrl-C and after a closed pipe: 128 plus the number of the signal.
INTERRUPTED, PIPE_CLOSED = 130, 141

#: ASCII replacements for characters that the terminal cannot show.
_SPELLED = {"±": "+/-", "→": "->", "…": "..."}
_HANDLER = "lomem.spelled"


def _spell(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    return "".join(_SPELLED.get(c, "?") for c in error.object[error.start : error.end]), error.end


codecs.register_error(_HANDLER, _spell)


def plus_minus() -> str:
    """The plus-minus sign, in ASCII if standard output cannot encode it."""
    return "±" if encodes("±") else "+/-"


@contextlib.contextmanager
def readable(stream: Any) -> Iterator[None]:
    """Makes a stream replace characters that it cannot encode, instead of raising."""
    if not isinstance(stream, io.TextIOWrapper) or encodes("±─", stream):
        yield
        return
    before = stream.errors
    stream.reconfigure(errors=_HANDLER)
    try:
        yield
    finally:
        with contextlib.suppress(ValueError, OSError):  # the stream may be closed
            stream.reconfigure(errors=before)


class _Muted(io.TextIOBase):
    """A stream that can be silenced. Code that keeps a reference, such as a log handler, can write again afterwards."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self.silent = True

    @property
    def encoding(self) -> str:  # type: ignore[override]
        return self._stream.encoding

    def write(self, text: str) -> int:
        return len(text) if self.silent else self._stream.write(text)

    def flush(self) -> None:
        if not self.silent:
            self._stream.flush()

    def fileno(self) -> int:
        return self._stream.fileno()

    def isatty(self) -> bool:
        return self._stream.isatty()


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Suppresses warnings, logs and prints of other libraries, also while they are imported.

    Warnings enabled with Python's option -W or PYTHONWARNINGS are still shown.
    """
    shown = bool(sys.warnoptions)
    disabled = logging.root.manager.disable
    with contextlib.ExitStack() as stack:
        if not shown:
            stack.enter_context(warnings.catch_warnings())
            warnings.simplefilter("ignore")
        stack.callback(logging.disable, disabled)
        logging.disable(max(disabled, logging.ERROR))
        redirects: tuple[Any, ...] = (contextlib.redirect_stdout, contextlib.redirect_stderr)
        for redirect, stream in zip(redirects, (sys.stdout, sys.stderr), strict=True):
            muted = _Muted(stream)
            muted.silent = not (shown and stream is sys.stderr)
            stack.callback(setattr, muted, "silent", False)
            stack.enter_context(redirect(muted))
        yield


def console() -> Console:
    """Returns a rich console for standard output that raises BrokenPipeError when the pipe is closed."""
    from rich.console import Console

    class Terminal(Console):
        def on_broken_pipe(self) -> None:
            raise BrokenPipeError

    # The stream is passed explicitly, so that progress and tables are shown while other libraries are silenced.
    return Terminal(file=sys.stdout)


def stop_writing(stream: Any) -> None:
    """Discards what is still buffered, which the interpreter would otherwise flush at exit, and report the failure."""
    with contextlib.suppress(AttributeError, ValueError, OSError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())
        os.close(nowhere)


def sentence(error: BaseException) -> str:
    """Formats an error of another library on one line, after the public name of its class."""
    kind = next(c for c in type(error).__mro__ if not c.__name__.startswith("_"))
    text = " ".join(str(error).split())
    if len(text) > 400:
        text = text[:400].rsplit(" ", 1)[0] + " ..."
    if kind.__module__.startswith("lomem") or text.startswith("lomem"):
        return text
    return f"{kind.__name__}: {text}" if text else kind.__name__
