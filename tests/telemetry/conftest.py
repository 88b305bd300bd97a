from collections.abc import Callable
from typing import Any

import pytest

from iiverl_core.samples import Prompt, Rollout
from iiverl_reward_client import Outcome
from rollouts import make_rollout


@pytest.fixture
def make_sample() -> Callable[..., Rollout]:
    """Make a rollout of which only what a test names matters."""

    def make(
        group: int = 0,
        member: int = 0,
        *,
        prompt: int = 3,
        response: int = 5,
        outcome: Outcome | None = None,
        finish: Any = "stop",
        text: str = "an answer",
        ground_truth: Any = None,
    ) -> Rollout:
        row = Prompt(
            row=10 + group,
            ids=tuple(range(prompt)),
            text="a question",
            data_source="org/set",
            ground_truth=ground_truth,
            source="rows.jsonl",
            source_row=10 + group,
        )
        return make_rollout(
            group,
            member,
            prompt=row,
            text=text,
            raw_text=text,
            response_length=response,
            finish_reason=finish,
            weights_version=4,
            log_prob=-7.5,
            outcome=outcome,
        )

    return make
