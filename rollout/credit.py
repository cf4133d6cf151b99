"""How many groups a worker takes."""

import math


def credit_groups(max_sequences: int, group_size: int, ahead: float) -> int:
    """How many groups a worker holds at once."""
    room = max(1, max_sequences // group_size)
    return room + math.ceil(ahead * room)
