"""`echelon serve MODEL`: a rollout worker's engine behind an OpenAI-compatible API, until SIGTERM or Ctrl-C."""

import argparse
import faulthandler
import signal
import sys
from pathlib import Path
from typing import Any

import msgspec
from msgspec import structs

from rewards.config import RewardConfig
from rollout.config import RolloutConfig
from rollout.service.config import ServiceConfig, check_exposure
from rollout.service.keys import read_key

ROLE = "serve"
DEFAULT_CONTEXT_TOKENS = 2048


def execute(args: argparse.Namespace) -> int:
    """Does not return. Raises: ValueError, in one line, for what cannot work; EngineDead."""
    config = settings_of(args)
    check_exposure(config)
    for file in (config.api_key_file, config.admin_key_file):
        if file is not None:
            read_key(file)
    config = in_positions(config, args.context_tokens)
    from databus.process import end_process
    from echelon.errors import set_up_logging
    from echelon.followed_run import follow_run
    from echelon.served_folder import open_folder
    from rollout.service.protocol import FollowRequest
    from rollout.service.run import serve
    from rollout.service.weights import WeightSources

    set_up_logging(ROLE)
    faulthandler.register(signal.SIGUSR1, all_threads=True)
    follow = FollowRequest(run=args.follow, keys=args.keys) if args.follow else None
    sources = WeightSources(open_folder=open_folder, join=follow_run)
    end_process(serve(config, sources, follow, ready=_say_ready))


def _say_ready(address: str) -> None:
    sys.stdout.write(f"ready at {address}\n")
    sys.stdout.flush()


def in_positions(config: ServiceConfig, asked: int | None) -> ServiceConfig:
    """With the context that the model has where it is less than the default.

    Raises: ValueError, in one line, where more was asked for, or the model cannot be loaded.
    """
    from echelon.model_check import model_positions

    positions = model_positions(config.model)
    if positions is None or config.rollout.context_tokens <= positions:
        return config
    if asked is not None:
        raise ValueError(f"--context-tokens is {asked}, but {config.model} has {positions} positions: lower it")
    return structs.replace(config, rollout=structs.replace(config.rollout, context_tokens=positions))


def settings_of(args: argparse.Namespace) -> ServiceConfig:
    """Raises: ValueError, in one line, naming the option."""
    model = Path(args.model).expanduser()
    rollout = _checked(
        RolloutConfig,
        {
            "device": args.device,
            "dtype": args.dtype,
            "context_tokens": DEFAULT_CONTEXT_TOKENS if args.context_tokens is None else args.context_tokens,
            "max_sequences": args.max_sequences,
            "kv_cache_gib": args.kv_cache_gib,
            "gpu_memory_fraction": args.gpu_memory_fraction,
            "enforce_eager": not args.graphs,
            "start_timeout_s": args.start_timeout_s,
        },
    )
    return _checked(
        ServiceConfig,
        {
            "model": str(model.resolve()) if model.is_dir() else args.model,
            "served_name": args.served_name or args.model,
            "host": args.host,
            "port": args.port,
            "api_key_file": args.api_key_file,
            "admin_key_file": args.admin_key_file,
            "drain_s": args.drain_s,
            "seed": args.seed,
            "rollout": msgspec.to_builtins(rollout),
            "draft": {"policy": args.draft, "max_tokens": args.draft_tokens},
            "reward": msgspec.to_builtins(_reward(args.reward_config)),
            "functions": {reference.rpartition(":")[2]: reference for reference in args.reward},
        },
    )


def _reward(file: str | None) -> RewardConfig:
    if file is None:
        return RewardConfig()
    try:
        return msgspec.json.decode(Path(file).expanduser().read_bytes(), type=RewardConfig)
    except (OSError, msgspec.MsgspecError) as error:
        raise ValueError(f"--reward-config {file}: {error}") from None


def _checked(kind: type[Any], values: dict[str, Any]) -> Any:
    """Raises: ValueError naming the option that is out of its bounds."""
    try:
        return msgspec.convert(values, kind)
    except msgspec.ValidationError as error:
        message, _, path = str(error).partition(" - at `$.")
        name = path.rstrip("`").replace("draft.max_tokens", "draft_tokens").replace("_", "-")
        raise ValueError(f"--{name}: {message}") from None
