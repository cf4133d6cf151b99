"""What scoring raises besides `ValueError` for a bad setting."""


class RewardError(Exception):
    """A reward function failed on a completion: it raised, hung, died, or returned no finite number.

    The text is one line for a person; it names the function. Picklable.
    """


class SandboxError(RewardError):
    """The sandbox itself failed, not what ran in it."""
