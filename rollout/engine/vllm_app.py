"""vLLM's own API server, its routes and their errors, over an engine of ours. Written against vLLM 0.32.0."""

import os
from typing import Any

from rollout.engine.vllm_served import ServedEngine

OWN_KEY_VARIABLE = "VLLM_API_KEY"
WITHOUT_EFFECT = frozenset(
    ("metadata", "prompt_cache_key", "prompt_cache_retention", "safety_identifier", "service_tier", "store", "user")
)
"""Fields of OpenAI's own that change nothing of what is said. vLLM does not read them, and they do no harm."""


async def make_app(engine: ServedEngine, model: str, served_name: str) -> Any:
    """A FastAPI app with all of vLLM's routes: whoever serves it chooses which of them can be reached.

    Args: engine: started. served_name: what requests call the model.
    """
    from vllm.entrypoints.launchers.api_server.app_state import init_app_state
    from vllm.entrypoints.launchers.app import build_app

    os.environ.pop(OWN_KEY_VARIABLE, None)  # keys are for us to check; vLLM would want this one as well
    client: Any = engine.client()
    arguments = _arguments(model, served_name)
    tasks = await client.get_supported_tasks()
    app = build_app(arguments, tasks, client.model_config)
    await init_app_state(client, app.state, arguments, tasks)
    _refuse_unknown_fields(app.state.openai_serving_completion, "create_completion")
    _refuse_unknown_fields(app.state.openai_serving_chat, "create_chat_completion")
    return app


def _refuse_unknown_fields(serving: Any, method: str) -> None:
    """vLLM drops what it does not know without a word: a misspelt `temperature` is 1. OpenAI's API answers 400."""
    answer = getattr(serving, method)

    async def checked(request: Any, *more: Any) -> Any:
        unknown = sorted(set(request.model_extra or ()) - WITHOUT_EFFECT)
        if unknown:
            return serving.create_error_response(f"unknown field {', '.join(map(repr, unknown))}", param=unknown[0])
        return await answer(request, *more)

    setattr(serving, method, checked)


def _arguments(model: str, served_name: str) -> Any:
    """What `vllm serve MODEL` would have, but for pages of other origins: they may not read what is served."""
    from vllm.entrypoints.launchers.cli_args import make_arg_parser
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    parser: Any = make_arg_parser(FlexibleArgumentParser())
    arguments = parser.parse_args(["--model", model, "--served-model-name", served_name, "--disable-fastapi-docs"])
    arguments.allowed_origins = []
    return arguments
