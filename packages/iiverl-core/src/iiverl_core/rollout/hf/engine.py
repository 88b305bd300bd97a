"""The rollout engine `hf`: batched sampling with any causal LM of transformers, on CPU or GPU."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from iiverl_core.errors import ConfigError
from iiverl_core.rollout.engine import Completion, Request, SamplingParams
from iiverl_core.rollout.hf.attention import use_grouped_sdpa
from iiverl_core.rollout.hf.cache import RowCache, cache_argument
from iiverl_core.rollout.hf.decode import decode
from iiverl_core.rollout.hf.model import build_model, stop_token_ids
from iiverl_core.rollout.requests import check_requests
from iiverl_core.rollout.weights import ExpectedWeights


class HFEngine:
    """Samples with a causal LM of transformers. Implements `iiverl_core.rollout.RolloutEngine`.

    A prompt is computed once for its responses, and a finished response leaves the batch. The model is built from its
    configuration and waits for its weights.
    """

    def __init__(
        self,
        model_path: str,
        *,
        dtype: torch.dtype,
        device: torch.device | str,
        tokenizer_path: str | None = None,
        trust_remote_code: bool = False,
        override_config: Mapping[str, Any] | None = None,
        max_sequences: int = 1024,
        prompts_per_batch: int | None = None,
    ) -> None:
        """Build the model.

        Args:
            model_path: folder or Hub name of a causal LM; only its configuration is read.
            dtype: of the engine's weights.
            device: where it runs.
            tokenizer_path: folder or Hub name of the tokenizer, by default the model's; it names an end-of-sentence.
            trust_remote_code: let code that comes with the model run.
            override_config: values that replace those of the model's `config.json`.
            max_sequences: responses written at a time, at most. A prompt with more responses is computed again for
                each part of them.
            prompts_per_batch: prompts answered at a time, at most.

        Raises:
            ConfigError: model or tokenizer cannot be read, or the model has no key-value cache.
        """
        self.weights_version = -1
        self._max_sequences = max_sequences
        self._prompts_per_batch = prompts_per_batch
        self._model = build_model(
            model_path,
            dtype=dtype,
            device=torch.device(device),
            trust_remote_code=trust_remote_code,
            override_config=override_config,
        )
        cache_argument(self._model)  # raises if the model takes no cache
        try:
            self._expected = ExpectedWeights(self._model)
        except ValueError as error:
            raise ConfigError(
                f"the rollout engine `hf` cannot be given the weights of '{model_path}': {error}"
            ) from error
        RowCache(self._model)  # raises where the model needs another kind of cache
        self._direct_mask = use_grouped_sdpa(self._model)
        self._vocabulary: int = self._model.config.get_text_config().vocab_size
        stop_ids = stop_token_ids(
            model_path, tokenizer_path, self._model, trust_remote_code=trust_remote_code
        )
        self._stop_ids = np.isin(np.arange(self._vocabulary), list(stop_ids))

    def update_weights(self, weights: Iterable[tuple[str, Tensor]], version: int) -> None:
        """Replace every weight by name, one tensor at a time; see `RolloutEngine.update_weights`.

        Tied weights may be given once. If this fails, the engine is left without weights.
        """
        self.weights_version = -1
        self._copy(weights)
        self.weights_version = version

    @torch.no_grad()
    def _copy(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        for name, value in self._expected.check(weights):
            self._expected.slots[name].copy_(value)

    def sleep(self, *, weights: bool = False) -> None:
        """Do nothing, or forget the weights: between two streams this engine holds nothing else."""
        if weights:
            self.weights_version = -1

    def close(self) -> None:
        """Forget the weights: nothing of this engine outlives it."""
        self.weights_version = -1

    def generate(self, requests: Sequence[Request], params: SamplingParams) -> Iterator[Completion]:
        """Yield each response as it finishes; see `RolloutEngine.generate`.

        Responses end at any end-of-sentence token that the tokenizer, the model's generation config or its
        configuration names, unless `params.ignore_eos`.

        Raises:
            RuntimeError: there are no weights, or they were updated before the last response was taken.
            ValueError: a prompt is empty or holds an unknown token, or `params` are out of range.
            FloatingPointError: the model's logits are not finite.
        """
        if self.weights_version < 0:
            raise RuntimeError("the rollout engine has no weights: call update_weights before generate")
        check_requests(requests, params, self._vocabulary)
        return self._generate(requests, params)

    @torch.inference_mode()
    def _generate(self, requests: Sequence[Request], params: SamplingParams) -> Iterator[Completion]:
        version = self.weights_version
        stop_ids = np.zeros_like(self._stop_ids) if params.ignore_eos else self._stop_ids
        for batch in _batches(requests, params.n, self._max_sequences, self._prompts_per_batch):
            responses = decode(
                self._model, batch.requests, batch.members, params, stop_ids, direct_mask=self._direct_mask
            )
            for response in responses:
                yield Completion(
                    key=response.request.key,
                    member=response.member,
                    token_ids=response.token_ids,
                    log_probs=response.log_probs,
                    finish_reason=response.finish_reason,
                    weights_version=version,
                )
                if self.weights_version != version:
                    raise RuntimeError(
                        f"weights were updated from version {version} to {self.weights_version} while responses were "
                        "being generated: take all responses before the update"
                    )


@dataclass(frozen=True)
class _Batch:
    """Requests that are answered together, and which of each one's responses are written."""

    requests: Sequence[Request]
    members: Sequence[int]


def _batches(
    requests: Sequence[Request], n: int, max_sequences: int, prompts_per_batch: int | None
) -> Iterator[_Batch]:
    """Divide requests into batches of prompts of similar lengths, the longest first: what fits once fits until the end."""
    wanted: dict[tuple[int, ...], list[Request]] = {}
    for request in requests:
        wanted.setdefault(tuple(request.numbers(n)), []).append(request)
    for members, alike in wanted.items():
        ordered = sorted(alike, key=lambda request: len(request.prompt_ids), reverse=True)
        size = max(min(prompts_per_batch or len(ordered), max_sequences // len(members)), 1)
        for start in range(0, len(ordered), size):
            for first in range(0, len(members), max_sequences):
                yield _Batch(ordered[start : start + size], members[first : first + max_sequences])
