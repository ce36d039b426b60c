"""Reading while the server is busy: an iterator that runs a little ahead in a thread of its own."""

import queue
import threading
from collections.abc import Iterator
from typing import Generic, TypeVar

T = TypeVar("T")
_POLL_S = 0.1


class ReadAhead(Generic[T]):
    """Iterates over `items`, at most `depth` of them taken before they are asked for. Use as a context manager.

    The thread is a daemon and only reads, so Ctrl-C in the consumer ends the program at once.
    """

    def __init__(self, items: Iterator[T], depth: int = 2) -> None:
        self._items = items
        self._ready: queue.Queue[tuple[T | None, BaseException | None, bool]] = queue.Queue(depth)
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._read, name="read-ahead", daemon=True)

    def __enter__(self) -> "ReadAhead[T]":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stopped.set()

    def __iter__(self) -> Iterator[T]:
        while True:
            item, error, is_end = self._ready.get()
            if error is not None:
                raise error
            if is_end:
                return
            yield item  # type: ignore[misc]  # None only beside an error or the end

    def _read(self) -> None:
        try:
            for item in self._items:
                self._put((item, None, False))
                if self._stopped.is_set():
                    return
        except BaseException as error:  # noqa: BLE001 - it belongs to the consumer
            self._put((None, error, True))
        else:
            self._put((None, None, True))

    def _put(self, entry: tuple[T | None, BaseException | None, bool]) -> None:
        while not self._stopped.is_set():
            try:
                return self._ready.put(entry, timeout=_POLL_S)
            except queue.Full:
                continue
        return None
