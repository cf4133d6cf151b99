"""Messages of the broker that promise something: they wait until what they promise is durable."""

from collections.abc import Sequence

from msgspec import Struct

from databus.codec import Frame
from databus.transport import BrokerSocket


class Outbox:
    """`send` as a socket's, but nothing leaves before `flush`."""

    def __init__(self, socket: BrokerSocket) -> None:
        self._socket = socket
        self._waiting: list[tuple[str, Struct, Sequence[Frame]]] = []

    def send(self, peer: str, message: Struct, frames: Sequence[Frame] = ()) -> bool:
        """False if nobody has that name's seat."""
        if not self._socket.has_seat(peer):
            return False
        self._waiting.append((peer, message, frames))
        return True

    def flush(self) -> None:
        waiting, self._waiting = self._waiting, []
        for peer, message, frames in waiting:
            self._socket.send(peer, message, frames)
