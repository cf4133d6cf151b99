"""`python -m echelon.roles.prepare RUN_DIR`: check model and data, and write the run's prompts.

It runs before every other role, so that bad input ends the run before anything else has started.
"""

import argparse
import logging
from typing import TYPE_CHECKING, Any

from databus.process import run_as_program
from echelon.errors import role_main
from echelon.run_folder import RunFolder

if TYPE_CHECKING:
    from rollout.config import EnvironmentConfig

logger = logging.getLogger(__name__)

ROLE = "prepare"


def prepare(folder: RunFolder, elsewhere: bool = False) -> None:
    """Args: elsewhere: the other roles run on other machines, so nothing is said of this one's devices.

    Raises: ValueError, in one line, for the first thing that cannot work.
    """
    from echelon.data import check_vocabulary, prompt_lines
    from echelon.hub import needs_hub, use_cache_if_offline
    from echelon.prompt_files import write_prompts
    from echelon.rows import load_rows
    from echelon.user_function import load_advantage
    from echelon.validate import check_reasoning
    from rewards.compose import load_parts
    from rollout.engine.end_tag import end_tag
    from rollout.engine.end_tokens import end_token_ids
    from rollout.environments.resolve import tool_schemas

    config = folder.config()
    if needs_hub(config):
        use_cache_if_offline()
    load_parts(config.reward, folder.path)
    load_advantage(config, folder.path)
    tools = tool_schemas(config.rollout.environment, folder.path)

    from echelon.model_check import check_adapters, check_devices, check_end_tokens, check_model, load_tokenizer

    if not elsewhere:
        check_devices(config)
    vocab_size = check_model(config)
    if config.learner.lora.is_on:
        check_adapters(config)
    tokenizer = load_tokenizer(config)
    check_end_tokens(config.model, end_token_ids(config.model), vocab_size)
    if config.rollout.reasoning.thinking_tokens > 0:
        end = end_tag(tokenizer, config.rollout.reasoning.end)
        check_vocabulary("rollout.reasoning.end", [end.token_ids], vocab_size)
        check_reasoning(config, len(end))
    if config.rollout.environment.name:
        _check_turns(config.rollout.environment, tokenizer, vocab_size)
    tokenizer.save_pretrained(folder.tokenizer)  # for those who show text and must stay light
    data = config.data
    sources = [("data.train", data.train, data.train_split, data.max_train, folder.train_prompts)]
    if config.eval.every > 0:
        sources.append(("data.eval", data.eval, data.eval_split, data.max_eval, folder.eval_prompts))
    for key, source, split, limit, file in sources:
        rows = load_rows(key, source, split, data, limit)
        write_prompts(file, prompt_lines(key, rows, config, tokenizer, vocab_size, tools))
        logger.info("%s: %d prompts from %s", key, len(rows), source)


def _check_turns(config: "EnvironmentConfig", tokenizer: Any, vocab_size: int) -> None:
    from echelon.data import check_vocabulary
    from rollout.environments.turn_tokens import TurnTokens

    turns = TurnTokens(tokenizer, config)
    check_vocabulary("rollout.environment", [[0, *turns.before, *turns.after]], vocab_size)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run_dir")
    parser.add_argument("--elsewhere", action="store_true", help="workers and learner run on other machines")
    args = parser.parse_args()
    folder = RunFolder(args.run_dir)
    return role_main(ROLE, folder.error_file(ROLE), lambda: prepare(folder, args.elsewhere))


if __name__ == "__main__":
    run_as_program(main)
