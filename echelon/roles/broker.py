"""`python -m echelon.roles.broker RUN_DIR`: the broker of a run. No torch, no transformers."""

import argparse
import logging
import signal
import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import msgspec

from databus.address import reachable, resolve_address
from databus.broker import Broker
from databus.config import BrokerConfig
from databus.evaluation import ACCURACY
from databus.journal import Journal, read_journal, recover
from databus.keys import server_keys
from databus.messages import Position
from databus.process import collect_garbage_seldom, run_as_program
from databus.prompts import Prompt, SampledGroup
from echelon.broker_settings import broker_settings, group_filters
from echelon.config import RunConfig, TracesConfig
from echelon.errors import SIGTERM_CODE, role_main
from echelon.files import NumberedRows, read_rows, write_atomically
from echelon.metrics import RowWriter, sample_rows
from echelon.prompt_files import PromptFile, ScheduledPrompts
from echelon.rollout_record import RolloutWriter
from echelon.run_folder import BusRecord, RunFolder
from learner.checkpoint_folder import latest_checkpoint, read_trainer_state
from rollout.scheduling.placement import LeastRemaining
from rollout.scheduling.scheduler import DifficultyScheduler

if TYPE_CHECKING:
    from echelon.traces import GroupTracer

logger = logging.getLogger(__name__)

ROLE = "broker"
ROWS_AT_ONCE = 200
"""For an observer: half a megabyte at most, and a millisecond of the broker's."""


class Terminated(Exception):
    """SIGTERM, as an exception that the broker turns into a last word to its peers."""


class FileSink:
    """Where the broker's figures go: metrics.jsonl and samples.jsonl."""

    def __init__(self, folder: RunFolder) -> None:
        self._rows = RowWriter(folder.metrics_file)
        self._samples = RowWriter(folder.samples_file)
        self._written = NumberedRows(folder.metrics_file)

    def write(self, row: Mapping[str, float]) -> None:
        self._rows.write(row)

    def samples(self, step: int, groups: Sequence[SampledGroup]) -> None:
        for row in sample_rows(step, groups):
            self._samples.write(row)

    def rows_from(self, first: int) -> Sequence[str]:
        return self._written.read(first, ROWS_AT_ONCE)


def serve(folder: RunFolder) -> None:
    """Raises: ValueError for an address that cannot be used; RunFailed where the run cannot go on."""
    signal.signal(signal.SIGTERM, _terminate)
    config = folder.config()
    segment = recover(folder.journal)
    has_past = any(True for _ in read_journal(folder.journal))
    # The journal knows all that happened; a run from before there were journals goes on from its checkpoint alone.
    start_step, position = (0, None) if has_past else where_to_start(folder)
    prompts = PromptFile(folder.train_prompts, config.seed, config.data.shuffle)
    evals = read_evaluation(folder) if config.eval.every > 0 else []
    scheduler = make_scheduler(config, prompts, position)
    keys = folder.keys(config.bus)
    rows = read_rows(folder.metrics_file)
    tracer = make_tracer(config.traces, folder.record().run_id)
    broker = Broker(
        broker_config(folder, start_step),
        ScheduledPrompts(prompts, scheduler.problem_of),
        evals,
        FileSink(folder),
        position,
        filters=group_filters(config),
        scheduler=scheduler,
        placement=LeastRemaining(),
        recorder=RolloutWriter(folder.rollouts_file, len(prompts)) if config.draft.record else None,
        keys=None if keys is None else server_keys(keys, "broker"),
        journal=Journal(folder.journal, segment),
        past=read_journal(folder.journal),
        first_row=len(rows),
        accuracies={row["step"]: row[ACCURACY] for row in rows if ACCURACY in row},
        listener=tracer,
    )
    address = reachable(broker.address)
    record = BusRecord(address=address, run_id=folder.record().run_id, keys="" if keys is None else str(keys))
    write_atomically(folder.bus_file, msgspec.json.encode(record))
    how = "plain text" if keys is None else f"keys in {keys}"
    logger.info("listening on %s (%s), from step %d, %d prompts", broker.address, how, start_step, len(prompts))
    collect_garbage_seldom()
    try:
        broker.run()
    except Terminated:
        sys.exit(SIGTERM_CODE)
    finally:
        if tracer is not None:
            tracer.close()


def make_tracer(config: TracesConfig, run_id: str) -> "GroupTracer | None":
    """None where there are to be no traces, which then cost nothing."""
    if not config.endpoint:
        return None
    from echelon.traces import GroupTracer, otlp_exporter

    return GroupTracer(otlp_exporter(config.endpoint), config.share, run_id)


def where_to_start(folder: RunFolder) -> tuple[int, Position | None]:
    """(step, data position) of the last checkpoint; the beginning where there is none."""
    checkpoint = latest_checkpoint(folder.checkpoints)
    if checkpoint is None:
        return 0, None
    state = read_trainer_state(checkpoint)
    return state.step, state.position


def make_scheduler(config: RunConfig, prompts: PromptFile, position: Position | None) -> DifficultyScheduler:
    """What the run schedules by, as it was at the checkpoint. Raises: ValueError where the two do not fit."""
    mixed = config.scheduling.mixing and config.data.shuffle
    scheduler = DifficultyScheduler(
        config.scheduling,
        prompts.prompt_tokens(),
        batch_groups=config.batch_groups,
        seed=config.seed,
        fixed_order=None if mixed else prompts.index_of,
    )
    scheduler.load(b"" if position is None else position.scheduling)
    return scheduler


def read_evaluation(folder: RunFolder) -> list[Prompt]:
    """All held-out problems, in the file's order."""
    prompts = PromptFile(folder.eval_prompts, seed=0, shuffle=False)
    return [prompts.get(cursor) for cursor in range(len(prompts))]


def broker_config(folder: RunFolder, start_step: int) -> BrokerConfig:
    config = folder.config()
    return broker_settings(
        config,
        run_id=folder.record().run_id,
        address=where_to_listen(folder, config),
        start_step=start_step,
        config_json=folder.config_file.read_bytes(),
        run_dir=str(folder.path),
    )


def where_to_listen(folder: RunFolder, config: RunConfig) -> str:
    """Where an earlier broker of the run did, which peers try again and again; the configuration says it otherwise."""
    address, earlier = config.bus.address, folder.bus()
    if earlier is not None and address == "auto":
        return earlier.address
    if earlier is not None and address.endswith(":*"):
        address = address.removesuffix("*") + earlier.address.rpartition(":")[2]
    return resolve_address(address, folder.path, config.bus.encrypted)


def _terminate(_signal: int, _frame: object) -> None:
    raise Terminated


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run_dir")
    folder = RunFolder(parser.parse_args().run_dir)
    return role_main(ROLE, folder.error_file(ROLE), lambda: serve(folder))


if __name__ == "__main__":
    run_as_program(main)
