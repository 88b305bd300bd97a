"""The part of a process that generates: a rollout engine with weights of its own, and rollouts from its completions."""

import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import count
from typing import Any

import torch
from torch import Tensor

from iiverl_core.config import Config, run_config
from iiverl_core.data import load_tokenizer
from iiverl_core.rollout import Completion, Request, Sampling, make_engine, sampling_params
from iiverl_core.samples import Handle, Prompt, Rollout, SampleId, SequenceRef, Split, TokenSequence

STREAM_SECONDS = 0.1  # how long finished rollouts may wait for others that leave with them
NOT_STORED = Handle(None)


@dataclass(frozen=True, slots=True)
class Question:
    """A prompt to be answered, of a step and group, and the seed of the responses' random numbers.

    `members` are the responses wanted, if not all of them.
    """

    split: Split
    step: int
    group: int
    prompt: Prompt
    seed: int
    members: tuple[int, ...] | None = None


def attach_handles(rollouts: Sequence[Rollout], reference: Any) -> list[Rollout]:
    """Point rollouts to their sequences, which lie in the store under `reference`, in the same order."""
    index = count()
    return [
        replace(
            rollout,
            sequences=tuple(
                replace(sequence, tokens=Handle(reference, next(index))) for sequence in rollout.sequences
            ),
        )
        for rollout in rollouts
    ]


class Generator:
    """A rollout engine, or this process's part of one, that takes questions and gives rollouts.

    If an engine spans several devices, all its processes are called alike, and the first gives the rollouts.
    """

    def __init__(self, config: Config, device: torch.device, rank: int) -> None:
        """Build the engine, still without weights; consecutive ranks have one together.

        Raises:
            ConfigError: the engine is not there or cannot run the model, or there is no tokenizer.
        """
        self._run = run_config(config)
        self._tokenizer = load_tokenizer(self._run)
        self._engine = make_engine(self._run, device)
        self._is_output_rank = rank % self._run.engine_devices == 0

    def update_weights(self, weights: Iterable[tuple[str, Tensor]], version: int) -> None:
        """Give the engine weights, each by name; raises as `RolloutEngine.update_weights` does."""
        self._engine.update_weights(weights, version)

    def sleep(self, forget: bool) -> None:
        """Let the engine give back the memory that only generating needs, and with `forget` its weights'."""
        if self._run.rollout.free_cache_engine:
            self._engine.sleep(weights=forget)

    def close(self) -> None:
        """End the engine, and maybe torch.distributed in this process with it; see `RolloutEngine.close`."""
        self._engine.close()

    def generate(
        self, questions: Sequence[Question], sampling: Sampling
    ) -> Iterator[tuple[list[TokenSequence], list[Rollout]]]:
        """Answer questions; yield the sequences of what is finished, and the rollouts they belong to, in one order.

        A runtime puts the sequences into its store and passes the rollouts on (`attach_handles`). A process that put
        them into a store by itself would take them along when it dies.
        """
        params = sampling_params(self._run, sampling)
        asked = {question.group: question for question in questions}
        requests = [
            Request(question.group, question.prompt.ids, question.seed, question.members)
            for question in questions
        ]
        finished: list[Completion] = []
        last = time.monotonic()
        for done in self._engine.generate(requests, params):
            if not self._is_output_rank:
                continue
            finished.append(done)
            if time.monotonic() - last > STREAM_SECONDS:
                yield self._rollouts(finished, asked)
                finished = []
                last = time.monotonic()
        if finished:
            yield self._rollouts(finished, asked)

    def _rollouts(
        self, finished: Sequence[Completion], asked: Mapping[int, Question]
    ) -> tuple[list[TokenSequence], list[Rollout]]:
        ids = [done.token_ids.tolist() for done in finished]
        texts = self._tokenizer.batch_decode(ids, skip_special_tokens=True)
        raw_texts = self._tokenizer.batch_decode(ids, clean_up_tokenization_spaces=False)
        sequences, rollouts = [], []
        for done, text, raw_text in zip(finished, texts, raw_texts, strict=True):
            question = asked[done.key]
            id = SampleId(question.split, question.step, question.group, done.member)
            sequence = TokenSequence.single_turn(question.prompt.ids, done.token_ids, done.log_probs)
            sequences.append(sequence)
            rollouts.append(
                Rollout(
                    id=id,
                    prompt=question.prompt,
                    text=text,
                    raw_text=raw_text,
                    finish_reason=done.finish_reason,
                    weights_version=done.weights_version,
                    log_prob=float(done.log_probs.sum()),
                    sequences=(SequenceRef(id, NOT_STORED, len(sequence.token_ids), sequence.trained),),
                )
            )
        return sequences, rollouts
