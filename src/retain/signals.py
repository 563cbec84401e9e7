"""How the command ends when it is told to: Ctrl-C, SIGTERM and SIGHUP give one sentence and 130, 143, 129.

    first signal     raises Told where the program is; in training with checkpoints SIGTERM and SIGHUP wait for the
                     end of the step instead, whose state is saved (`Patience`)
    second signal    ends the process at once

An exception from a signal can get lost: compiled code makes another error of it, a destructor prints and drops it, a
bare `except` swallows it. So the first signal is remembered, whatever error comes out counts as its end, and a thread
sends the program a reminder while nobody handles it. That thread hears signals by a pipe, so the second one also ends a
program that is inside compiled code.

Only the command line calls `watch`; a program that imports retain keeps its own handlers. This file imports nothing but
the standard library's small modules: it is there before torch is, which takes seconds.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any, NoReturn, Protocol

NAMES: dict[int, str] = {
    number: name
    for name in ("SIGINT", "SIGTERM", "SIGHUP")
    if (number := getattr(signal, name, None)) is not None
}
REMINDER = 0.5
"""Seconds between reminders to a program that swallowed the first signal."""


class Told(BaseException):
    """The process was told to end. No `Exception`, and no KeyboardInterrupt: nobody on the way makes it theirs."""


class Stopped(Exception):
    """Training ended where it was asked to; its message says what is saved."""


class Stop(Protocol):
    """Asks `fit` to end after the step that it is in. It is entered while somebody listens to it."""

    def __call__(self) -> bool: ...
    def __enter__(self) -> object: ...
    def __exit__(self, *error: object) -> object: ...


class Patience:
    """The `Stop` of the command line: while it is entered, the first SIGTERM or SIGHUP only asks."""

    def __init__(self) -> None:
        self.listening = self.asked = False

    def __call__(self) -> bool:
        return self.asked

    def __enter__(self) -> Patience:
        self.listening = True
        return self

    def __exit__(self, *error: object) -> None:
        self.listening = False
        if self.asked and not any(error):  # the loop was over before it looked
            raise Told


class _State:
    """Of this process: there is one, as there is one set of handlers."""

    def __init__(self) -> None:
        self.number = 0  # the first signal
        self.times = 0
        self.over = self.said = False  # the command is over; its sentence is out
        self.kept: str | None = None  # what training says that it saved
        self.patience = Patience()
        self.whole = False  # a process of its own (`watch`), not a call in somebody's
        self.before: dict[int, Any] = {}


_now = _State()
patience = _now.patience


def told() -> int:
    """The signal that this process was told to end by; 0: none."""
    return _now.number


def code() -> int:
    """The exit code of that, as a shell writes it."""
    return 128 + (_now.number or signal.SIGTERM)


def sentence(command: str | None = None) -> str:
    """What happened, what is kept, and what the same command does now."""
    how = "interrupted" if _now.number == signal.SIGINT else f"ended by {NAMES.get(_now.number, 'SIGTERM')}"
    command = command or next((word for word in sys.argv[1:] if not word.startswith("-")), None)
    if _now.kept:
        return f"{how}: {_now.kept}, and the same command continues"
    if _now.over:
        return f"{how}: the command had finished, and its result is kept"
    if command in ("run", "federate"):
        return f"{how}: what was saved is kept, and the same command continues"
    return f"{how}: nothing was written, and the same command starts again from the beginning"


def end(error: BaseException, command: str | None) -> int:
    """Say the sentence for what ended a command; returns the exit code. `Stopped` brings what it kept."""
    if not _now.number:
        _now.number = signal.SIGINT if isinstance(error, KeyboardInterrupt) else signal.SIGTERM
    _now.kept = str(error) if isinstance(error, Stopped) else None
    say(command)
    return code()


def say(command: str | None = None) -> None:
    """The sentence, once, and by one of a launcher's processes. Straight to the screen: a print may be what was cut."""
    if _now.said:
        return
    _now.said = True
    if os.environ.get("RANK", "0") != "0" and os.environ.get("WORLD_SIZE", "1") != "1":
        return
    text = f"{sentence(command)}\n"
    with suppress(OSError, ValueError):
        if sys.stderr is sys.__stderr__:
            start = "\n" if os.isatty(2) else ""  # the terminal wrote ^C, or a bar is on the line
            os.write(2, (start + text).encode(errors="replace"))
        else:
            sys.stderr.write(text)


def leave(status: int) -> NoReturn:
    """End the process: wait for its threads, do what was registered for the end, print what is left.

    Python's own end gives the signals back to the system while it takes the modules apart. Here none finds the
    process half gone.
    """
    _now.over = True
    _now.said = _now.said or status not in (0, code())  # an error has had its sentence
    with suppress(Exception):
        threading._shutdown()  # type: ignore[attr-defined]  # as multiprocessing ends its processes
        _atexit()
    _flush()
    os._exit(status)


def _atexit() -> None:
    import atexit

    atexit._run_exitfuncs()


def _flush() -> None:
    """What is left to print; a reader that is gone is no error."""
    for stream in (sys.stdout, sys.stderr):
        with suppress(Exception):
            stream.flush()


# -- the handlers ----------------------------------------------------------------------------------------------------


def _handle(number: int, frame: FrameType | None) -> None:
    _now.times += 1
    if _now.times > 1:
        _end_at_once()
    _now.number = number
    if _now.over:
        _end_at_once()
    if _now.patience.listening and number != signal.SIGINT:
        _now.patience.asked = True
        return
    if _now.whole and _importing(frame):
        _end_at_once()
    raise Told


def _importing(frame: FrameType | None) -> bool:
    """Whether a module is being imported: torch's own may be in C++, where an exception of ours aborts the process."""
    while frame is not None:
        if frame.f_code.co_filename.startswith("<frozen importlib"):
            return True
        frame = frame.f_back
    return False


def _end_at_once() -> NoReturn:
    say()
    os._exit(code())


def _remind(number: int, frame: FrameType | None) -> None:
    """Raise again, unless somebody is at it: an `except` or `finally` that cleans up is not disturbed."""
    error = sys.exc_info()[1]
    while error is not None:
        if isinstance(error, Told):
            return
        error = error.__context__
    if _now.number and not _now.over and not _now.patience.asked:
        if _importing(frame):
            _end_at_once()
        raise Told


def _install() -> bool:
    """Handlers for what is not ignored: nohup and a job in the background say so by ignoring."""
    if threading.current_thread() is not threading.main_thread():
        return False
    for number in NAMES:
        if (before := signal.getsignal(number)) not in (signal.SIG_IGN, None):
            _now.before[number] = before
            signal.signal(number, _handle)
    return True


def watch() -> None:
    """From now on the whole process ends as this file says. For the entry points of the command line only."""
    if _now.whole or not _install():
        return
    _now.whole = True
    sys.excepthook, sys.unraisablehook = _uncaught(sys.excepthook), _dropped(sys.unraisablehook)
    if hasattr(signal, "SIGALRM"):
        read, write = os.pipe()
        os.set_blocking(write, False)
        signal.signal(signal.SIGALRM, _remind)
        signal.set_wakeup_fd(write, warn_on_full_buffer=False)
        threading.Thread(target=_listen, args=(read,), daemon=True, name="signals").start()


@contextmanager
def watching() -> Iterator[None]:
    """The same for one call inside another program; its handlers come back. Within `watch` it does nothing."""
    if _now.whole:
        yield
        return
    _now.number = _now.times = 0
    _now.said, _now.kept, _now.patience.asked = False, None, False
    ours = _install()
    try:
        yield
    finally:
        if ours:
            for number, before in _now.before.items():
                signal.signal(number, before)
            _now.before.clear()


def _listen(read: int) -> None:
    """Reminders after the first signal; the end after the second, where the program is deaf inside compiled code."""
    heard = 0
    while heard < 2:
        heard += sum(number in NAMES for number in os.read(read, 64))
        if heard == 1:
            threading.Thread(target=_keep_reminding, daemon=True, name="reminders").start()
    time.sleep(REMINDER)  # its own handler comes first
    _end_at_once()


def _keep_reminding() -> None:
    main = threading.main_thread()
    with suppress(ValueError, OSError):
        while True:
            time.sleep(REMINDER)
            if _now.number and not _now.over and main.ident is not None:
                signal.pthread_kill(main.ident, signal.SIGALRM)


def _uncaught(before: Callable[..., Any]) -> Callable[..., Any]:
    """Told while the command line was still being imported: nobody there catches it."""

    def hook(kind: type[BaseException], error: BaseException, trace: Any) -> None:
        if _now.number:
            leave(end(error, None))
        before(kind, error, trace)

    return hook


def _dropped(before: Callable[..., Any]) -> Callable[..., Any]:
    """A destructor that was interrupted says nothing: the reminder comes."""

    def hook(unraisable: Any) -> None:
        if not _now.number:
            before(unraisable)

    return hook
