"""Errors of the bus; each is one line for a person.

BusError
├── BusRefused   the broker does not take this peer, or the address is not one the bus may use
├── BusLost      the other side has gone silent
└── BusTimeout   no answer in time
"""


class BusError(RuntimeError):
    """Something between two roles went wrong."""


class BusRefused(BusError):
    """Refused for good: trying again will not help."""


class BusLost(BusError):
    """The other side has not been heard for `peer_timeout_s`."""


class BusTimeout(BusError):
    """An answer did not come in time."""
