"""Fail fast without a network: the hub's client would retry for half a minute a file."""

import logging
import os
import urllib.error
import urllib.request
from pathlib import Path

from echelon.config import RunConfig
from echelon.generated_rows import is_generated

logger = logging.getLogger(__name__)

OFFLINE_VARIABLE = "HF_HUB_OFFLINE"
PROBE_TIMEOUT_S = 5.0


def needs_hub(config: RunConfig) -> bool:
    sources = (config.model, config.data.train, config.data.eval)
    return any(source and not is_generated(source) and not Path(source).exists() for source in sources)


def use_cache_if_offline() -> None:
    """Where the hub does not answer, have its client use what was downloaded before, and nothing else.

    Call it before `transformers` and `datasets` are imported: they read the variable once.
    """
    if os.environ.get(OFFLINE_VARIABLE):
        return
    from huggingface_hub import constants

    request = urllib.request.Request(constants.ENDPOINT, method="HEAD")
    try:
        urllib.request.urlopen(request, timeout=PROBE_TIMEOUT_S).close()
    except urllib.error.HTTPError:
        return  # it answers
    except OSError as error:
        logger.warning("the hub does not answer (%s): using what is in its cache", error)
        os.environ[OFFLINE_VARIABLE] = "1"
        constants.HF_HUB_OFFLINE = True
