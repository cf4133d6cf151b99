import pytest
import torch
from torch import nn

from learner.config import LearnerConfig
from learner.optimizer import build_optimizer, clip_gradients, lr_factor, resume_schedule


@pytest.mark.parametrize(
    ("schedule", "factors"),
    [
        # 2 warm-up steps of 6: 1/3, 2/3, then 4 steps from the peak down.
        ("constant", [1 / 3, 2 / 3, 1, 1, 1, 1]),
        ("linear", [1 / 3, 2 / 3, 1, 0.75, 0.5, 0.25]),
        ("cosine", [1 / 3, 2 / 3, 1, 0.853553, 0.5, 0.146447]),
    ],
)
def test_schedules_by_hand(schedule: str, factors: list[float]) -> None:
    config = LearnerConfig(steps=6, warmup_steps=2, schedule=schedule)  # type: ignore[arg-type]
    assert [lr_factor(step, config) for step in range(6)] == pytest.approx(factors, abs=1e-6)


def test_resumed_schedule_continues() -> None:
    config = LearnerConfig(steps=6, lr=1e-2, warmup_steps=2, schedule="cosine")
    parameters = [nn.Parameter(torch.ones(2))]
    optimizer, scheduler = build_optimizer(parameters, config)
    rates = []
    for _ in range(6):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    resumed, resumed_scheduler = build_optimizer(parameters, config)
    resume_schedule(resumed_scheduler, 3)
    for rate in rates[3:]:
        assert resumed.param_groups[0]["lr"] == resumed_scheduler.get_last_lr()[0] == rate
        resumed.step()
        resumed_scheduler.step()


def test_clipping_by_hand() -> None:
    parameters = [nn.Parameter(torch.zeros(1)), nn.Parameter(torch.zeros(1))]
    parameters[0].grad, parameters[1].grad = torch.tensor([3.0]), torch.tensor([4.0])
    assert clip_gradients(parameters, max_norm=1.0) == pytest.approx(5.0)
    assert [float(parameter.grad) for parameter in parameters if parameter.grad is not None] == pytest.approx(
        [0.6, 0.8]
    )
