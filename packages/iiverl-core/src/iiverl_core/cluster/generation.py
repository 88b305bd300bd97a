"""The part of a process that generates: a rollout engine with weights of its own, and samples out of its rollouts."""

import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from iiverl_core.config import Config, run_config
from iiverl_core.data import load_tokenizer
from iiverl_core.rollout import (
    RolloutRequest,
    RolloutTokens,
    Sampling,
    SingleTurn,
    make_engine,
    run_rollouts,
    sampling_params,
)
from iiverl_core.samples import Handle, Sample, Tokens

STREAM_SECONDS = 0.1  # how long finished samples may wait for others that leave with them
NOWHERE = Handle(None)


def stored(samples: Sequence[Sample], reference: Any) -> list[Sample]:
    """Give samples handles to their token arrays, which lie in the store under `reference`, in the same order."""
    return [replace(sample, tokens=Handle(reference, i)) for i, sample in enumerate(samples)]


class Generator:
    """A rollout engine, or this process's part of one, that takes requests and gives samples.

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

    def sleep(self, discard_weights: bool) -> None:
        """Let the engine release the memory that only generating needs, and with `discard_weights` its weights'."""
        if self._run.rollout.free_cache_engine:
            self._engine.sleep(discard_weights=discard_weights)

    def close(self) -> None:
        """End the engine, and maybe torch.distributed in this process with it; see `RolloutEngine.close`."""
        self._engine.close()

    def generate(
        self, requests: Sequence[RolloutRequest], sampling: Sampling
    ) -> Iterator[list[Tokens] | list[Sample]]:
        """Make rollouts; yield in turn the token arrays of what is finished, and the samples that they belong to.

        A runtime keeps the arrays where all find them, and passes on the samples (`stored`). A process that put them
        into a store by itself, and yielded samples that name them, would take them along when it dies; and Ray, which
        counts who still needs an object, miscounts those that are named within what a generator yields.
        """
        params = sampling_params(self._run, sampling)
        finished: list[RolloutTokens] = []
        last = time.monotonic()
        for done in run_rollouts(self._engine, SingleTurn(), requests, params):
            if not self._reports:
                continue
            finished.append(done)
            if time.monotonic() - last > STREAM_SECONDS:
                yield from self._answers(finished)
                finished = []
                last = time.monotonic()
        if finished:
            yield from self._answers(finished)

    def _answers(self, finished: Sequence[RolloutTokens]) -> Iterator[list[Tokens] | list[Sample]]:
        tokens = [
            Tokens(
                np.asarray(done.prompt.ids, dtype=np.int64),
                done.response_ids,
                done.sequences[0].log_probs[len(done.prompt.ids) :],
            )
            for done in finished
        ]
        ids = [done.response_ids.tolist() for done in finished]
        texts = self._tokenizer.batch_decode(ids, skip_special_tokens=True)
        raw_texts = self._tokenizer.batch_decode(ids, clean_up_tokenization_spaces=False)
        samples = [
            Sample(
                prompt=done.prompt,
                group=done.id.group,
                member=done.id.member,
                text=text,
                raw_text=raw_text,
                response_length=len(done.response_ids),
                finish_reason=done.finish_reason,
                weights_version=done.weights_version,
                log_prob=float(each.log_probs.sum()),
                tokens=NOWHERE,
            )
            for done, each, text, raw_text in zip(finished, tokens, texts, raw_texts, strict=True)
        ]
        yield tokens
        yield samples
