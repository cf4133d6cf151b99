"""What the broker says once it is durable: messages, and whatever else must not happen before."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

from msgspec import Struct

from databus.codec import Frame
from databus.transport import BrokerSocket, Said


class _Message(NamedTuple):
    peer: str
    said: Said


class Outbox:
    """First gathered, then sealed while what they promise is being written, then said."""

    def __init__(self, socket: BrokerSocket) -> None:
        self._socket = socket
        self._gathered: list[_Message | Callable[[], object]] = []
        self._sealed: list[_Message | Callable[[], object]] = []

    @property
    def is_empty(self) -> bool:
        return not self._gathered and not self._sealed

    def send(self, peer: str, message: Struct, frames: Sequence[Frame] = ()) -> bool:
        """As a socket's, but nothing leaves yet. False if nobody has that name's seat."""
        if not self._socket.has_seat(peer):
            return False
        self._gathered.append(_Message(peer, (message, frames)))
        return True

    def send_ahead(self, peer: str, message: Struct, frames: Sequence[Frame]) -> bool:
        """At once: what means nothing until a message that waits here refers to it."""
        return self._socket.send(peer, message, frames)

    def then(self, action: Callable[[], object]) -> None:
        self._gathered.append(action)

    def seal(self) -> None:
        """Only what was gathered by now is for the next `flush`."""
        self._sealed += self._gathered
        self._gathered = []

    def flush(self) -> None:
        """What each peer is told stays in its order, and is sent at once."""
        sealed, self._sealed = self._sealed, []
        by_peer: dict[str, list[Said]] = {}
        for each in sealed:
            if isinstance(each, _Message):
                by_peer.setdefault(each.peer, []).append(each.said)
            else:
                each()
        for peer, all_said in by_peer.items():
            self._socket.send_all(peer, all_said)
