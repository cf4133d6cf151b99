from pathlib import Path

import pytest


@pytest.fixture
def address(tmp_path_factory: pytest.TempPathFactory) -> str:
    """An ipc address whose path is short enough."""
    folder: Path = tmp_path_factory.mktemp("bus")
    return f"ipc://{folder}/s"
