"""The data types of a step: prompts, the rollouts sampled from them, and their token sequences.

Decisions and tensors are separate. Token arrays (`TokenSequence`) stay in the store and are referred to by `Handle`s, which
only workers resolve. The controller, scorers and reports see a `Rollout`: text, lengths, outcome. Ranks receive
`SequenceRef`s: lengths and handles.
"""

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, NamedTuple, TypeAlias

import numpy as np

from iiverl_reward_client import Outcome

FinishReason: TypeAlias = Literal["stop", "length"]
Split: TypeAlias = Literal["train", "val"]

ROLLOUT_LOG_PROBS = "rollout_log_probs"
"""Name of the log-probs under the distribution that the engine sampled from; they come with the tokens."""
STALENESS = "staleness"
"""Name of the array that says by how many steps the weights that sampled a token are older than in turn."""


class SampleId(NamedTuple):
    """Identifies a response within the whole run.

    `step` counts from 1 (validation before training is step 0), `group` numbers the prompts of a step and `member` the
    responses to a prompt; a greedy baseline comes after the sampled ones. Scorers, engines, dumps and reports use it as
    their key.
    """

    split: Split
    step: int
    group: int
    member: int

    def __str__(self) -> str:
        return f"{self.split} step {self.step}, group {self.group}, member {self.member}"


class PickledByFields:
    """A dataclass with slots that is pickled by its fields' values, which takes a tenth of the default's time."""

    __slots__ = ()

    def __reduce__(self) -> tuple[type, tuple[Any, ...]]:
        return type(self), tuple(getattr(self, name) for name in self.__slots__)


@dataclass(frozen=True, slots=True)
class Prompt(PickledByFields):
    """One row of a dataset, ready for the model.

    `row` is its position in the (concatenated, filtered) dataset; `source` and `source_row` are the dataset as the user
    names it and the row there, counted from 0. `ids` are the tokens that the model reads, and `text` is
    the same as a string. `columns` has every other column of the row, including `extra_info` and the reward server's
    `verification_info` if the dataset has them. `chat` has the messages if the prompt is a chat, since a reward model may
    use a different chat template. `images` are encoded (PNG, JPEG, …) as the dataset has them, in the order of their
    placeholders (`columns.IMAGE`) in the prompt; `ids` have as many tokens for each as the model reads for it.
    """

    row: int
    ids: tuple[int, ...]
    text: str
    data_source: str = ""
    ground_truth: Any = None
    columns: Mapping[str, Any] = field(default_factory=dict)
    chat: tuple[Mapping[str, Any], ...] | None = None
    source: str = ""
    source_row: int = 0
    images: tuple[bytes, ...] = ()

    @property
    def place(self) -> str:
        """Where the row is, for messages."""
        return place_of(self.source, self.source_row)

    def for_engine(self) -> "Prompt":
        """Return the part that an engine reads: row, token ids and images, without text and columns."""
        return replace(self, text="", ground_truth=None, columns={}, chat=None, source="")

    def tokens_only(self) -> "Prompt":
        """Return row and token ids."""
        return replace(self.for_engine(), images=())


def place_of(source: str, row: int) -> str:
    """Name a row of a dataset, as the user can find it there."""
    return f"{source}, row {row} (the first is 0)"


@dataclass(frozen=True, slots=True)
class Handle(PickledByFields):
    """Refers to the `index`-th value of a list in the store, `ref`."""

    ref: Any
    index: int = 0


class Handles(list[Handle]):
    """Handles that are pickled by columns, since a pickler takes microseconds per object."""

    def __reduce__(self) -> tuple[Any, ...]:
        refs = {id(handle.ref): handle.ref for handle in self}
        position = {key: i for i, key in enumerate(refs)}
        which = [position[id(handle.ref)] for handle in self]
        return _handles, (list(refs.values()), which, [handle.index for handle in self])


def _handles(refs: list[Any], which: list[int], indices: list[int]) -> Handles:
    return Handles(Handle(refs[i], index) for i, index in zip(which, indices, strict=True))


KEPT_IDS, KEPT_COUNTS = "kept_ids", "kept_counts"
"""Names in `TokenSequence.extras` of `KeptTokens`, for all trained tokens in turn."""

TURN_REWARDS = "turn_rewards"
"""Name in `TokenSequence.extras` of the rewards of turns, (trained,) float32: each at the turn's last token, 0 elsewhere."""


@dataclass(frozen=True, slots=True, eq=False)
class ImageInputs(PickledByFields):
    """An image as its model reads it.

    `pixel_values` (P, …) float32 are its patches or tiles, and `grid` (3,) int64 the number of patches along time, height
    and width, empty for a model that needs none. `tokens` is how many the image has, one after another, and `digest` that
    of the encoded image: equal images have equal digests. `thumbnail` is a small JPEG for reports, empty if there are none.
    """

    pixel_values: np.ndarray
    grid: np.ndarray
    tokens: int
    digest: bytes
    thumbnail: bytes = b""


class SequenceImage(NamedTuple):
    """An image whose first token is at position `start` of a sequence."""

    start: int
    image: ImageInputs


class Thumbnail(NamedTuple):
    """A small image (JPEG) for reports, and a name that is equal for equal images only."""

    name: str
    data: bytes


def content_of(token_ids: Sequence[int] | np.ndarray, images: Sequence[SequenceImage]) -> np.ndarray:
    """Return numbers (L,) int64 that are equal where sequences are: token ids or, for images, their digests."""
    content = np.array(token_ids, dtype=np.int64)
    for start, image in images:
        content[start : start + image.tokens] = -1 - int.from_bytes(image.digest[:7])
    return content


class KeptTokens(NamedTuple):
    """The tokens that top-k and top-p kept when a response was sampled: what each of its tokens was drawn from.

    `ids` (K,) int32 has those of the first token, then those of the second, …, and `counts` (R,) int32 how many each has; 0
    for the whole vocabulary.
    """

    ids: np.ndarray
    counts: np.ndarray


class WeightsSpan(NamedTuple):
    """Consecutive tokens of a response that were sampled by the weights of one version."""

    version: int
    tokens: int


def joined_spans(*spans: WeightsSpan) -> tuple[WeightsSpan, ...]:
    """Join neighbouring spans of one version, and leave out empty ones."""
    joined: list[WeightsSpan] = []
    for each in spans:
        if joined and joined[-1].version == each.version:
            each = WeightsSpan(each.version, joined.pop().tokens + each.tokens)
        if each.tokens:
            joined.append(each)
    return tuple(joined)


@dataclass(frozen=True, slots=True)
class TokenSequence:
    """Token arrays of a rollout. Stays in the store; only workers read it.

    `token_ids` (L,) int64: prompt, responses and tool results in order. `loss_mask` (L,) bool: sampled by the policy and
    trained on; never set at position 0, which is not predicted. `log_probs` (L,) float32, nats, under the distribution
    the token was sampled from, 0 where the mask is off. `extras` holds further arrays by name, such as what top-k and top-p
    kept (`KEPT_IDS`). `images` are in the order of their tokens.
    """

    token_ids: np.ndarray
    loss_mask: np.ndarray
    log_probs: np.ndarray
    extras: Mapping[str, np.ndarray] = field(default_factory=dict)
    images: tuple[SequenceImage, ...] = ()

    @classmethod
    def single_turn(
        cls,
        prompt_ids: Sequence[int] | np.ndarray,
        response_ids: np.ndarray,
        log_probs: np.ndarray,
        kept: KeptTokens | None = None,
        images: tuple[SequenceImage, ...] = (),
    ) -> "TokenSequence":
        """Join a prompt and its response, all of whose tokens are trained on.

        `log_probs` and `kept` are those of the response, `images` those of the prompt.
        """
        prompt = len(prompt_ids)
        return cls(
            token_ids=np.concatenate([np.asarray(prompt_ids, dtype=np.int64), response_ids]),
            loss_mask=np.arange(prompt + len(response_ids)) >= prompt,
            log_probs=np.concatenate([np.zeros(prompt, dtype=log_probs.dtype), log_probs]),
            extras={} if kept is None else {KEPT_IDS: kept.ids, KEPT_COUNTS: kept.counts},
            images=images,
        )

    @classmethod
    def untrained(cls, token_ids: Sequence[int] | np.ndarray) -> "TokenSequence":
        """Make a sequence without trained tokens, for example for a reward model."""
        ids = np.asarray(token_ids, dtype=np.int64)
        return cls(ids, np.zeros(len(ids), dtype=bool), np.zeros(len(ids), dtype=np.float32))

    @property
    def content(self) -> np.ndarray:
        """Numbers (L,) that are equal where sequences are; see `content_of`."""
        return content_of(self.token_ids, self.images)

    @property
    def trained(self) -> int:
        """Number of trained tokens."""
        return int(self.loss_mask.sum())

    @property
    def trained_log_probs(self) -> np.ndarray:
        """The engine's log-probs of the trained tokens, (trained,)."""
        return self.log_probs[self.loss_mask]

    def prefix_of(self, prompt_ids: Sequence[int], images: Sequence[SequenceImage] = ()) -> int:
        """Count the first tokens that are those of a prompt with these images, without the sequence's last token."""
        size = min(len(prompt_ids), len(self.token_ids) - 1)
        different = np.flatnonzero(self.content[:size] != content_of(prompt_ids, images)[:size])
        return int(different[0]) if len(different) else size


@dataclass(frozen=True, slots=True)
class SequenceRef(PickledByFields):
    """A sequence as ranks receive it: no text, no dataset columns, no outcome; pickles to less than 1 kB.

    `tokens` refers to a `TokenSequence`, `length` counts its tokens and `trained` those with the loss mask on. Its first
    `prefix` tokens, not all, are those of its group's prompt. `arrays` refers to float arrays with one entry per trained
    token, (trained,): `old_log_probs`, `values`, `advantages`, ….
    """

    id: SampleId
    tokens: Handle
    length: int
    trained: int
    prefix: int = 0
    arrays: Mapping[str, Handle] = field(default_factory=dict)

    @property
    def shared(self) -> Hashable:
        """Equal for sequences that have their first `prefix` tokens in common."""
        return self.id.group, self.prefix

    def with_arrays(self, arrays: Mapping[str, Handle]) -> "SequenceRef":
        """Add arrays."""
        arrays = {**self.arrays, **arrays}
        return SequenceRef(self.id, self.tokens, self.length, self.trained, self.prefix, arrays)

    def stored_at(self, tokens: Handle) -> "SequenceRef":
        """Set the handle of the token arrays."""
        return SequenceRef(self.id, tokens, self.length, self.trained, self.prefix, self.arrays)


class SequenceRefs(list[SequenceRef]):
    """References with the same arrays, pickled by columns as `Handles` are."""

    def __reduce__(self) -> tuple[Any, ...]:
        names = tuple(self[0].arrays) if self else ()
        return _sequence_refs, (
            list(zip(*(each.id for each in self), strict=True)),
            Handles(each.tokens for each in self),
            [each.length for each in self],
            [each.trained for each in self],
            [each.prefix for each in self],
            names,
            [Handles(each.arrays[name] for each in self) for name in names],
        )


def _sequence_refs(
    ids: list[tuple[Any, ...]],
    tokens: Handles,
    lengths: list[int],
    trained: list[int],
    prefixes: list[int],
    names: tuple[str, ...],
    arrays: list[Handles],
) -> SequenceRefs:
    rows = zip(*arrays, strict=True) if names else [()] * len(tokens)
    columns = zip(zip(*ids, strict=True), tokens, lengths, trained, prefixes, rows, strict=True)
    return SequenceRefs(
        SequenceRef(SampleId(*id), handle, length, count, prefix, dict(zip(names, row, strict=True)))
        for id, handle, length, count, prefix, row in columns
    )


@dataclass(frozen=True, slots=True)
class SampledTurn(PickledByFields):
    """A turn of a conversation that the policy wrote: its message's position, its tokens, and its reward if it has one."""

    message: int
    tokens: int
    reward: float | None = None


@dataclass(frozen=True, slots=True)
class Rollout(PickledByFields):
    """One response with its prompt and outcome, as scorers and reports see it.

    `text` is the response without special tokens, `raw_text` with them. `weights_version` is the version of the weights
    that generated it, and `log_prob` the sum of the log-probs of all sampled tokens under the distribution sampled from, in
    nats. A rollout has several sequences if its context was rewritten between turns, otherwise one. With several turns,
    `text` is the last one, `messages` the whole conversation, `turns` what the policy wrote of it, and `counts` numbers for
    metrics by name. A rollouter may set the `outcome`; otherwise the scorer does. `images` are those of the prompt or, with
    several turns, of `messages`, in the order of their placeholders (`columns.IMAGE`), if the run keeps samples. If newer weights came while it was
    written, `weights_version` is the last, and `spans` say which tokens, in the order in which they were sampled, come from
    which.
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
    messages: tuple[Mapping[str, Any], ...] | None = None
    turns: tuple[SampledTurn, ...] = ()
    counts: Mapping[str, float] = field(default_factory=dict)
    images: tuple[Thumbnail, ...] = ()
    spans: tuple[WeightsSpan, ...] = ()

    @property
    def versions(self) -> set[int]:
        """The versions of the weights that sampled it."""
        return {each.version for each in self.spans} or {self.weights_version}

    @property
    def prompt_length(self) -> int:
        """Tokens in the prompt."""
        return len(self.prompt.ids)

    @property
    def response_length(self) -> int:
        """Tokens that the policy sampled: the trained tokens of all sequences."""
        return sum(sequence.trained for sequence in self.sequences)

    @property
    def length(self) -> int:
        """Tokens of all sequences."""
        return sum(sequence.length for sequence in self.sequences)
