"""Rollouts as the loop hands them to a scorer."""

from collections.abc import Callable
from typing import Any

import pytest

from iiverl_core.samples import Prompt, Rollout
from rollouts import make_rollout


def _make_sample(
    text: str = "",
    ground_truth: Any = None,
    data_source: str = "openai/gsm8k",
    key: tuple[int, int] = (0, 0),
    **columns: Any,
) -> Rollout:
    prompt = Prompt(
        row=key[0],
        ids=(1, 2, 3),
        text="question",
        data_source=data_source,
        ground_truth=ground_truth,
        columns=columns,
        source="rows.jsonl",
        source_row=key[0],
    )
    return make_rollout(*key, prompt=prompt, text=text, raw_text=f"{text}<end>", response_length=len(text))


@pytest.fixture
def make_sample() -> Callable[..., Rollout]:
    """Makes a rollout of a response, a ground truth, a data source, a `(group, member)` key and columns."""
    return _make_sample
