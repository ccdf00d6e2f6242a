"""SIGTERM as a request: the current step is finished, the rest of the run is left for its continuation."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Callable, Generator, Iterator
from types import FrameType, TracebackType
from typing import Any

from ..data.pipeline import LoadedBatch

_HELD = (signal.SIGTERM, signal.SIGCHLD)


class Stopping:
    """Notes SIGTERM instead of dying of it; use as a context manager.

    Signals come in where `asked` is called, never in the middle of native code: oneDNN's matrix products on
    the CPU (`ops.linear`) were seen to corrupt memory when a handler ran on their stack. Handlers and the
    signal mask change in the main thread only; what was there before comes back at the end.

    Attributes:
        requested: SIGTERM has come in.
    """

    def __init__(self) -> None:
        self.requested = False
        self._main = threading.current_thread() is threading.main_thread()
        self._before: dict[signal.Signals, Any] = {}
        self._mask: set[signal.Signals | int] = set()
        self._batches: Generator[LoadedBatch, None, None] | None = None

    def __enter__(self) -> Stopping:
        self._install(signal.SIGTERM, self._note)
        if self._main:
            self._mask = set(signal.pthread_sigmask(signal.SIG_BLOCK, _HELD))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if self._batches is not None:
                self._batches.close()  # ends the workers
            if self._main:
                signal.pthread_sigmask(signal.SIG_SETMASK, self._mask)
        finally:
            for number, handler in self._before.items():
                signal.signal(number, signal.SIG_DFL if handler is None else handler)

    def asked(self) -> bool:
        """Let waiting signals in; whether SIGTERM has come so far."""
        with self._open():
            return self.requested

    def guard(
        self, make: Callable[[], Iterator[LoadedBatch]], again: Callable[[int], LoadedBatch]
    ) -> Iterator[LoadedBatch]:
        """The batches that `make` gives; where a SIGTERM to all processes took the workers, `again` goes on.

        A dead worker raises in the main process (SIGCHLD). That is left out once SIGTERM has come, so that
        every process can finish the step that the others are at.

        Args:
            make: starts the loader.
            again: makes the batch of a number, from 0, in this process.
        """
        with self._open():  # workers inherit the mask, and are to die of SIGTERM
            batches = make()  # installs the loader's handler
        self._install(signal.SIGCHLD, self._child_ended)
        self._batches = _continued(batches, self, again)
        return self._batches

    @contextlib.contextmanager
    def _open(self) -> Iterator[None]:
        if not self._main:
            yield
            return
        signal.pthread_sigmask(signal.SIG_SETMASK, self._mask)
        try:
            yield
        finally:
            signal.pthread_sigmask(signal.SIG_BLOCK, _HELD)

    def _install(self, number: signal.Signals, handler: Callable[[int, FrameType | None], None]) -> None:
        if self._main:
            self._before[number] = signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.requested = True

    def _child_ended(self, number: int, frame: FrameType | None) -> None:
        before = self._before.get(signal.SIGCHLD)
        if not self.requested and callable(before):
            before(number, frame)


def _continued(
    batches: Iterator[LoadedBatch], stopping: Stopping, again: Callable[[int], LoadedBatch]
) -> Generator[LoadedBatch, None, None]:
    number, lost = 0, False
    while True:
        try:
            batch = again(number) if lost else next(batches)
        except StopIteration:
            return
        except (RuntimeError, OSError, EOFError):  # what a loader raises of dead workers
            if lost or not stopping.asked():
                raise
            lost = True
            continue
        number += 1
        yield batch
