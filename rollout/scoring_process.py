"""What a worker's scoring processes do first. Imports nothing heavy: they would all wait for it."""

import faulthandler
import signal

from databus.process import die_with_parent


def prepare_scoring() -> None:
    """It ends with its parent, and tells where it stands when it is asked."""
    die_with_parent()
    faulthandler.register(signal.SIGUSR1, all_threads=True)
