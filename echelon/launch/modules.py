"""The roles' modules, which are run with `python -m`, and what workers and ranks are told wherever they are."""

from echelon.config import RunConfig

PREPARE, BROKER, LEARNER, WORKER = "prepare", "broker", "learner", "worker"
PREPARE_MODULE, BROKER_MODULE, LEARNER_MODULE, WORKER_MODULE = (
    f"echelon.roles.{role}" for role in (PREPARE, BROKER, LEARNER, WORKER)
)


def module_of(name: str) -> str:
    """Of the role that goes by `name`, such as `worker-3`."""
    return f"echelon.roles.{name.partition('-')[0]}"


def worker_words(run_dir: str, name: str, spare: bool) -> list[str]:
    """What follows `python -m`."""
    return [WORKER_MODULE, run_dir, "--name", name, *(["--spare"] if spare else [])]


def worker_defaults(config: RunConfig) -> dict[str, str]:
    """vLLM places its threads itself; torch's get in one another's way where cores are few."""
    return {"OMP_NUM_THREADS": "1"} if config.rollout.engine == "small" else {}


def ranks_defaults(config: RunConfig) -> dict[str, str]:
    """One thread on a CPU: the engine has cores of its own. In turns two were slower than one (decision 031)."""
    return {"OMP_NUM_THREADS": "1"} if config.learner.device == "cpu" else {}
