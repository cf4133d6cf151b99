"""Stands between workers and a weight server, and may change or lose what the server sends."""

import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import msgspec
import zmq

from databus.messages import FromWeightServer

Change = Callable[[Any, list[bytes]], list[bytes] | None]


@contextmanager
def relay(address: str, change: Change) -> Iterator[str]:
    """The address to connect to, for one peer at a time.

    Args: change: from a message and its frames to the frames that are passed on; None loses the message.
    """
    context = zmq.Context()
    with tempfile.TemporaryDirectory() as folder:
        front, back = context.socket(zmq.ROUTER), context.socket(zmq.DEALER)
        front.bind(f"ipc://{folder}/relay")
        back.connect(address)
        stop = threading.Event()
        thread = threading.Thread(target=_pass_on, args=(front, back, change, stop))
        thread.start()
        try:
            yield f"ipc://{folder}/relay"
        finally:
            stop.set()
            thread.join()
            context.destroy(linger=0)


def _pass_on(front: zmq.Socket, back: zmq.Socket, change: Change, stop: threading.Event) -> None:
    decoder = msgspec.msgpack.Decoder(FromWeightServer)
    poller = zmq.Poller()
    poller.register(front, zmq.POLLIN)
    poller.register(back, zmq.POLLIN)
    peer = b""
    while not stop.is_set():
        ready = dict(poller.poll(20))
        if front in ready:
            peer, *request = front.recv_multipart()
            back.send_multipart(request)
        if back in ready:
            header, *frames = back.recv_multipart()
            changed = change(decoder.decode(header), frames)
            if changed is not None:
                front.send_multipart([peer, header, *changed])
