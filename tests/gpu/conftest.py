"""What every test on a GPU needs."""

import pytest
import torch


@pytest.fixture(autouse=True)
def needs_cuda() -> None:
    if not torch.cuda.is_available():
        pytest.skip("no NVIDIA GPU")
