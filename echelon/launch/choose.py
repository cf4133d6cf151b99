"""From `--on` to the launcher; what a launcher needs is imported only where it is asked for."""

from importlib.util import find_spec

from echelon.config import RunConfig
from echelon.launch.base import Launcher, On
from echelon.launch.local import LocalLauncher


def make_launcher(on: On, config: RunConfig) -> Launcher:
    """Raises: ValueError, in one line, where what it needs is not here."""
    match on:
        case "local":
            return LocalLauncher()
        case "ray":
            check_installed("ray")
            from echelon.launch.ray_cluster import RayLauncher

            return RayLauncher(config)
        case "allocation":
            from echelon.launch.allocation import AllocationLauncher

            return AllocationLauncher(config)
        case "slurm":
            raise AssertionError("a job is submitted, not launched")


def check_installed(package: str, extra: str = "") -> None:
    """Raises: ValueError saying how to install it."""
    if find_spec(package) is None:
        raise ValueError(f"--on {extra or package} needs the package {package}: pip install -e '.[{extra or package}]'")
