"""The data types of a step: prompts, the rollouts sampled from them, and their token sequences.

Decisions and tensors travel apart. Token arrays (`TokenSequence`) stay in the store and are named by `Handle`s, which
only workers open. The controller, scorers and reports see a `Rollout`: text, lengths, outcome. Ranks are sent
`SequenceRef`s: lengths and handles.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
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

    def tokens_only(self) -> "Prompt":
        """Give the part that an engine reads: row and token ids, without text and columns."""
        return replace(self, text="", ground_truth=None, columns={}, chat=None)


@dataclass(frozen=True, slots=True)
class Handle:
    """Names the `index`-th value of a list that lies in the store under `ref`."""

    ref: Any
    index: int = 0


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

    @classmethod
    def single_turn(
        cls, prompt_ids: Sequence[int] | np.ndarray, response_ids: np.ndarray, log_probs: np.ndarray
    ) -> "TokenSequence":
        """Join a prompt and its response, every token of which is trained on; `log_probs` are the response's."""
        prompt = len(prompt_ids)
        return cls(
            token_ids=np.concatenate([np.asarray(prompt_ids, dtype=np.int64), response_ids]),
            loss_mask=np.arange(prompt + len(response_ids)) >= prompt,
            log_probs=np.concatenate([np.zeros(prompt, dtype=log_probs.dtype), log_probs]),
        )

    @classmethod
    def untrained(cls, token_ids: Sequence[int] | np.ndarray) -> "TokenSequence":
        """Make a sequence that is only read, as by a reward model."""
        ids = np.asarray(token_ids, dtype=np.int64)
        return cls(ids, np.zeros(len(ids), dtype=bool), np.zeros(len(ids), dtype=np.float32))

    @property
    def trained(self) -> int:
        """Number of trained tokens."""
        return int(self.loss_mask.sum())


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

    @property
    def prompt_length(self) -> int:
        """Tokens in the prompt."""
        return len(self.prompt.ids)

    @property
    def response_length(self) -> int:
        """Tokens that the policy wrote: the trained ones of all sequences."""
        return sum(sequence.trained for sequence in self.sequences)

    @property
    def length(self) -> int:
        """Tokens of all sequences."""
        return sum(sequence.length for sequence in self.sequences)
