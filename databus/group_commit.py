"""Group commit: what the broker promises is said once it is durable, and its thread never waits for the disk.

While one part of the journal is being written, records and messages of the next gather: the slower the disk, the more
is made durable at a time.
"""

import logging
import sys
import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor

from databus.codec import Frame
from databus.crash import crash_point
from databus.journal import DiskFull, Journal, Place
from databus.outbox import Outbox
from databus.records import Record

logger = logging.getLogger(__name__)

TRY_AGAIN_S = 1.0
SEGMENT_BYTES = 1 << 29
"""A segment is read as a whole; beyond this size another is begun."""
SWITCH_S = 0.0005
"""Python's own 5 ms, waited for after every call to the disk while the broker is busy, would make a commit ten times as
long."""


class GroupCommit:
    """A journal and what waits for it. disk_full: why nothing is being said; "" while there is room."""

    def __init__(self, journal: Journal | None, outbox: Outbox) -> None:
        """Args: journal: None writes nothing down."""
        if journal is not None:
            sys.setswitchinterval(SWITCH_S)
        self._journal = journal
        self._outbox = outbox
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="journal")
        self._writing: Future[None] | None = None
        self._try_at = 0.0
        self.disk_full = ""

    @property
    def is_busy(self) -> bool:
        """Is something being written now?"""
        return self._writing is not None

    @property
    def is_idle(self) -> bool:
        """Has all been said?"""
        return self._writing is None and self._outbox.is_empty

    def turn(self) -> None:
        """Say what is durable by now, and begin to write what has come since. Raises: OSError where the disk fails."""
        if self._writing is not None and self._writing.done():
            self._end(self._writing)
        if self._writing is None and time.monotonic() >= self._try_at:
            self._begin()

    def _begin(self) -> None:
        if not self.disk_full:
            self._outbox.seal()
        if self._journal is not None and self._journal.segment_bytes > SEGMENT_BYTES:
            self.roll()
        if self._journal is not None and self._journal.begin():
            self._writing = self._thread.submit(self._journal.write)
        else:
            self._outbox.flush()

    def _end(self, written: "Future[None]") -> None:
        """What was being written is durable, once it is. Waits for it."""
        assert self._journal is not None
        self._writing = None
        try:
            written.result()
        except DiskFull as error:
            if not self.disk_full:
                logger.warning("nothing is acknowledged, leased or handed out until there is room: %s", error)
            self.disk_full, self._try_at = str(error), time.monotonic() + TRY_AGAIN_S
            return
        if self.disk_full:
            logger.warning("there is room again: going on")
            self.disk_full = ""
        self._journal.end()
        crash_point("before_ack")
        self._outbox.flush()

    def roll(self, records: Sequence[tuple[Record, Sequence[Frame]]] = ()) -> list[Place] | None:
        """Go on in a new segment that begins with these, after all that was appended is durable.

        Returns: their places; None without a journal, or while the disk is full. Raises: OSError where the disk fails.
        """
        if self._writing is not None:
            self._end(self._writing)
        if self._journal is None or self.disk_full:
            return None
        try:
            return self._journal.roll(records)
        except DiskFull as error:
            logger.warning("no new segment of the journal: %s", error)
            return None

    def drop_before(self, segment: int) -> None:
        """Delete the segments below this one."""
        if self._journal is not None:
            self._journal.drop_before(segment)

    def close(self) -> None:
        """Make the rest durable. Raises: DiskFull."""
        self._thread.shutdown()
        if self._writing is not None:
            self._end(self._writing)
        if self._journal is not None:
            self._journal.close()
