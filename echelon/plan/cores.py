"""Cores that all roles of a machine share: where more are wanted than there are, everybody slows down alike."""

from typing import Protocol


class Sharer(Protocol):
    def set_speed(self, factor: float) -> None:
        """Go on at this share of full speed."""
        ...


class SharedCores:
    """How fast everybody is: cores there are over cores wanted, 1 at most."""

    def __init__(self, cores: float) -> None:
        """Args: cores: 0: nobody shares any."""
        self._cores = cores
        self._wanted: dict[int, float] = {}
        self._sharers: list[Sharer] = []
        self.factor = 1.0

    def join(self, sharer: Sharer) -> None:
        self._sharers.append(sharer)

    def want(self, sharer: Sharer, cores: float) -> None:
        """`sharer` is at work on so many, 0 while it is not."""
        if not self._cores or self._wanted.get(id(sharer), 0.0) == cores:
            return
        self._wanted[id(sharer)] = cores
        factor = slowdown(self._cores, sum(self._wanted.values()))
        if factor != self.factor:
            self.factor = factor
            for each in self._sharers:
                each.set_speed(factor)


def slowdown(cores: float, wanted: float) -> float:
    """Share of full speed that roles have which want so many cores together. Args: cores: 0: no limit."""
    return 1.0 if not cores or wanted <= cores else cores / wanted
