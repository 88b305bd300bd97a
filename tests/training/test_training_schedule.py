"""Learning rates as existing runs have them."""

import pytest

from iiverl_core.config import OptimConfig
from iiverl_core.training.schedule import learning_rate


def rates(total: int, steps: int, **optim) -> list[float]:
    return [learning_rate(step, total, OptimConfig(lr=1e-3, **optim)) for step in range(steps)]


def test_constant_with_warmup() -> None:
    assert rates(100, 4, lr_warmup_steps=2) == pytest.approx([0, 5e-4, 1e-3, 1e-3])


def test_cosine_with_warmup_and_floor() -> None:
    expected = [0, 5e-4, 1e-3, 7.75e-4, 3.25e-4]
    assert rates(5, 5, warmup_style="cosine", lr_warmup_steps=2, min_lr_ratio=0.1) == pytest.approx(expected)


def test_cosine_stays_at_its_floor() -> None:
    assert rates(5, 9, warmup_style="cosine", min_lr_ratio=0.1)[-1] == pytest.approx(1e-4)
    assert rates(5, 6, warmup_style="cosine")[-1] == pytest.approx(0)


def test_a_floor_is_a_learning_rate_or_a_fraction() -> None:
    cosine = {"warmup_style": "cosine", "lr_warmup_steps": 2}
    assert rates(5, 6, min_lr=1e-4, **cosine) == rates(5, 6, min_lr_ratio=0.1, **cosine)
    assert rates(5, 6, min_lr=7e-4, min_lr_ratio=0.1, **cosine) == rates(5, 6, min_lr_ratio=0.1, **cosine)
    assert learning_rate(9, 5, OptimConfig(lr=0, min_lr=0, warmup_style="cosine")) == 0


def test_warmup_by_ratio_and_own_length() -> None:
    assert rates(20, 3, lr_warmup_steps_ratio=0.1) == pytest.approx([0, 5e-4, 1e-3])
    assert rates(1000, 2, lr_warmup_steps_ratio=0.1, total_training_steps=20) == pytest.approx([0, 5e-4])
    assert rates(20, 2) == pytest.approx([1e-3, 1e-3])
