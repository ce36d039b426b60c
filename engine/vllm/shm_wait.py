"""How EngineCore and its worker on the CPU wait for each other's messages: asleep, until the other one wakes them.

vLLM's own condition yields the processor in a loop for a second after each message. Where there are few cores, the loop
takes one from the front end and from training, and from whoever else is on the machine: with two cores and Linux 6.18,
a client's process was kept waiting for more than a second while its answer was ready (docs/measurements/latency.md).
"""

import contextlib
import errno
import socket
from typing import Any

from vllm.distributed.device_communicators import shm_broadcast

_MAX_READERS = 1024


class _SleepCondition:
    """In place of vLLM's `SpinCondition`, whose methods it has: a writer wakes the readers of a ring buffer.

    Each reader has an abstract Unix socket, which leaves no file behind. A message that finds the socket full is not
    missed, as others wait in it; one that is sent before the reader waits ends the wait at once.
    """

    local_notify_socket = read_cancel_socket = write_cancel_socket = None
    """vLLM closes these with the queue; there are none."""

    def __init__(self, is_reader: bool, context: Any, notify_address: str) -> None:  # noqa: ARG002 - vLLM's
        self.is_reader = is_reader
        self._name = notify_address.rpartition("/")[2]
        self._own = b""
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        if is_reader:
            self._bind()

    def record_read(self) -> None:
        """Nothing to record: the next wait sleeps at once."""

    def cancel(self) -> None:
        """Wake the reader, from another thread of its process."""
        if self.is_reader:
            self._send(self._own)

    def wait(self, timeout_ms: int | None = None) -> None:
        """Sleep until the writer has written since, or the time is over. It may also return early."""
        self._socket.settimeout(None if timeout_ms is None else max(timeout_ms, 1) / 1000)
        with contextlib.suppress(TimeoutError):
            self._socket.recv(1)

    def notify(self) -> None:
        """Wake all readers."""
        for number in range(_MAX_READERS):
            if not self._send(self._address(number)):
                return

    def _address(self, number: int) -> bytes:
        return f"\0mace-{self._name}-{number}".encode()

    def _bind(self) -> None:
        """Take the first address that no other reader has."""
        for number in range(_MAX_READERS):
            self._own = self._address(number)
            try:
                self._socket.bind(self._own)
            except OSError as error:
                if error.errno != errno.EADDRINUSE or number + 1 == _MAX_READERS:
                    raise
            else:
                return

    def _send(self, address: bytes) -> bool:
        """Whether somebody has this address."""
        try:
            self._socket.sendto(b"\0", socket.MSG_DONTWAIT, address)
        except BlockingIOError:
            return True
        except ConnectionRefusedError:
            return False
        return True


def sleep_between_messages() -> None:
    """Let message queues that are made from now on sleep. Writer and readers of a queue have to agree."""
    shm_broadcast.SpinCondition = _SleepCondition
