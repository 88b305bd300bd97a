"""The part of a process that generates: a rollout engine with weights of its own, and samples out of its completions."""

import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from iiverl_core.config import Config, run_config
from iiverl_core.data import load_tokenizer
from iiverl_core.rollout import Completion, Request, Sampling, make_engine, sampling_params
from iiverl_core.samples import Handle, Prompt, Sample, Tokens

STREAM_SECONDS = 0.1  # how long finished samples may wait for others that leave with them
NOWHERE = Handle(None)


@dataclass(frozen=True, slots=True)
class Question:
    """A prompt to be answered, the group that its answers are of, and the seed of their random numbers.

    `members` are the answers wanted where it is not all of them.
    """

    group: int
    prompt: Prompt
    seed: int
    members: tuple[int, ...] | None = None


def stored(samples: Sequence[Sample], reference: Any) -> list[Sample]:
    """Give samples handles to their token arrays, which lie in the store under `reference`, in the same order."""
    return [replace(sample, tokens=Handle(reference, i)) for i, sample in enumerate(samples)]


class Generator:
    """A rollout engine, or this process's part of one, that takes questions and gives samples.

    Where an engine is spread over several devices, all its processes are called alike, and the first gives the samples.
    """

    def __init__(self, config: Config, device: torch.device, rank: int) -> None:
        """Build the engine, still without weights; consecutive ranks have one together.

        Raises:
            ConfigError: the engine is not there or cannot run the model, or there is no tokenizer.
        """
        self._run = run_config(config)
        self._tokenizer = load_tokenizer(self._run)
        self._engine = make_engine(self._run, device)
        self._reports = rank % self._run.engine_devices == 0

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
    ) -> Iterator[list[Tokens] | list[Sample]]:
        """Answer questions; yield in turn the token arrays of what is finished, and the samples that they belong to.

        A runtime keeps the arrays where all find them, and passes on the samples (`stored`). A process that put them
        into a store by itself, and yielded samples that name them, would take them along when it dies; and Ray, which
        counts who still needs an object, miscounts those that are named within what a generator yields.
        """
        params = sampling_params(self._run, sampling)
        prompts = {question.group: question.prompt for question in questions}
        requests = [
            Request(question.group, question.prompt.ids, question.seed, question.members)
            for question in questions
        ]
        finished: list[Completion] = []
        last = time.monotonic()
        for done in self._engine.generate(requests, params):
            if not self._reports:
                continue
            finished.append(done)
            if time.monotonic() - last > STREAM_SECONDS:
                yield from self._answers(finished, prompts)
                finished = []
                last = time.monotonic()
        if finished:
            yield from self._answers(finished, prompts)

    def _answers(
        self, finished: Sequence[Completion], prompts: Mapping[int, Prompt]
    ) -> Iterator[list[Tokens] | list[Sample]]:
        tokens = [
            Tokens(np.asarray(prompts[done.key].ids, dtype=np.int64), done.token_ids, done.log_probs)
            for done in finished
        ]
        ids = [done.token_ids.tolist() for done in finished]
        texts = self._tokenizer.batch_decode(ids, skip_special_tokens=True)
        raw_texts = self._tokenizer.batch_decode(ids, clean_up_tokenization_spaces=False)
        samples = [
            Sample(
                prompt=prompts[done.key],
                group=done.key,
                member=done.member,
                text=text,
                raw_text=raw_text,
                response_length=len(done.token_ids),
                finish_reason=done.finish_reason,
                weights_version=done.weights_version,
                log_prob=float(done.log_probs.sum()),
                tokens=NOWHERE,
            )
            for done, text, raw_text in zip(finished, texts, raw_texts, strict=True)
        ]
        yield tokens
        yield samples
