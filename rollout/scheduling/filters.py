"""Which completed groups are not worth training on."""

from databus.groups import Group


class ZeroVarianceFilter:
    """Drops groups whose rewards are all equal: their advantages are zero, and so is their gradient.

    Source: DAPO (arXiv:2503.14476), dynamic sampling.
    """

    def keep(self, group: Group) -> bool:
        return bool(group.rewards.max() > group.rewards.min())
