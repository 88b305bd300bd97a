"""Samples as the loop would hand them to a scorer."""

from collections.abc import Callable
from typing import Any

import pytest

from iiverl_core.samples import Handle, Prompt, Sample


def _make_sample(
    text: str = "",
    ground_truth: Any = None,
    data_source: str = "openai/gsm8k",
    key: tuple[int, int] = (0, 0),
    **columns: Any,
) -> Sample:
    prompt = Prompt(
        row=key[0],
        ids=(1, 2, 3),
        text="question",
        data_source=data_source,
        ground_truth=ground_truth,
        columns=columns,
    )
    return Sample(
        prompt=prompt,
        group=key[0],
        member=key[1],
        text=text,
        raw_text=f"{text}<end>",
        response_length=len(text),
        finish_reason="stop",
        weights_version=0,
        tokens=Handle(ref=None),
        log_prob=0.0,
    )


@pytest.fixture
def make_sample() -> Callable[..., Sample]:
    """Makes a sample of a response, a ground truth, a data source, a `(group, member)` key and columns."""
    return _make_sample
