"""What flows through a step: prompts, the sequences sampled from them, and what becomes known of each.

Decisions and tensors travel apart. A `Sample` is small and seen by the controller: lengths, text, score. Its token
arrays stay where a worker put them and are named by `Handle`s, which only workers open.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, TypeAlias

import numpy as np

from iiverl_reward_client import Outcome

FinishReason: TypeAlias = Literal["stop", "length"]
Split: TypeAlias = Literal["train", "val"]


class SampleId(NamedTuple):
    """Name of one response for the whole run.

    `step` counts from 1 (validation before training is step 0), `group` numbers the prompts of a step and `member` the
    responses to a prompt. A greedy baseline has the member behind the sampled ones. Scorers, engines, dumps and
    reports use it as their key.
    """

    split: Split
    step: int
    group: int
    member: int

    def __str__(self) -> str:
        return f"{self.split} step {self.step}, group {self.group}, member {self.member}"


@dataclass(frozen=True, slots=True)
class Prompt:
    """One row of a dataset, ready for the model.

    `row` is its position in the (concatenated, filtered) dataset; `ids` are the tokens the model is given and `text`
    the same as a string; `columns` holds every other column of the row, among them `extra_info` and the reward
    server's `verification_info` where the dataset has them. `chat` holds the messages where the prompt is a chat: a
    reward model may have a chat template of its own.
    """

    row: int
    ids: tuple[int, ...]
    text: str
    data_source: str = ""
    ground_truth: Any = None
    columns: Mapping[str, Any] = field(default_factory=dict)
    chat: tuple[Mapping[str, Any], ...] | None = None


@dataclass(frozen=True, slots=True)
class Handle:
    """The `index`-th array (or `Tokens`) of a list that a worker put into the store under `ref`."""

    ref: Any
    index: int = 0


@dataclass(frozen=True, slots=True)
class Tokens:
    """The token arrays of one sampled sequence.

    `prompt_ids` (P,) int64; `response_ids` (R,) int64, the end-of-sentence token included where it was sampled;
    `log_probs` (R,) float32, of each response token under the distribution it was sampled from, in nats.
    """

    prompt_ids: np.ndarray
    response_ids: np.ndarray
    log_probs: np.ndarray


@dataclass(frozen=True, slots=True)
class Sample:
    """One response to one prompt.

    `group` is the position of its prompt in the step's batch and `member` its number among the prompt's responses.
    `text` is the response without special tokens, `raw_text` with them.
    `weights_version` is the version of the weights that wrote it, `log_prob` the log-prob of the whole response under
    the distribution it was sampled from, in nats. `arrays` names more per-token arrays of shape
    (R,), by what they are: `old_log_probs`, `ref_log_probs`, `values`, `advantages`, `returns`, ….
    """

    prompt: Prompt
    group: int
    member: int
    text: str
    raw_text: str
    response_length: int
    finish_reason: FinishReason
    weights_version: int
    log_prob: float
    tokens: Handle
    outcome: Outcome | None = None
    arrays: Mapping[str, Handle] = field(default_factory=dict)

    @property
    def prompt_length(self) -> int:
        """Tokens in the prompt."""
        return len(self.prompt.ids)

    @property
    def length(self) -> int:
        """Tokens in prompt and response together."""
        return self.prompt_length + self.response_length


@dataclass(frozen=True, slots=True)
class TokenSequence:
    """Token arrays of a rollout. Lives in the store; only workers open it.

    `token_ids` (L,) int64: prompt, responses and tool results in order. `loss_mask` (L,) bool: sampled by the policy and
    trained on; never set at position 0, which nothing predicts. `log_probs` (L,) float32, nats, under the distribution
    the token was sampled from, 0 where the mask is off. `extras` holds further model inputs by name.
    """

    token_ids: np.ndarray
    loss_mask: np.ndarray
    log_probs: np.ndarray
    extras: Mapping[str, np.ndarray] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class SequenceRef:
    """A sequence as it is sent to ranks: no text, no dataset columns, no outcome; pickles to less than 1 kB.

    `tokens` names a `TokenSequence`, `length` counts its tokens and `trained` those with the loss mask on. `arrays`
    names float arrays with one entry per trained token, (trained,): `old_log_probs`, `values`, `advantages`, ….
    """

    id: SampleId
    tokens: Handle
    length: int
    trained: int
    arrays: Mapping[str, Handle] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Rollout:
    """One response with its prompt and outcome, as scorers and reports see it.

    `text` is the response without special tokens, `raw_text` with them. `weights_version` is the version of the weights
    that wrote it, and `log_prob` the log-prob of all sampled tokens under the distribution sampled from, in nats.
    A rollout has one sequence, or several if its context was rewritten on the way.
    """

    id: SampleId
    prompt: Prompt
    text: str
    raw_text: str
    finish_reason: FinishReason
    weights_version: int
    log_prob: float
    sequences: tuple[SequenceRef, ...]
    outcome: Outcome | None = None
