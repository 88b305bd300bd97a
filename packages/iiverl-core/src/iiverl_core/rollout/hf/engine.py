"""The rollout engine `hf`: batched sampling with any causal LM of transformers, on CPU or GPU."""

from collections.abc import Collection, Iterable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from iiverl_core.config import ModelConfig
from iiverl_core.errors import ConfigError
from iiverl_core.rollout.engine import Completion, GenerationRequest, SamplingParams, check_request
from iiverl_core.rollout.hf.attention import use_grouped_sdpa
from iiverl_core.rollout.hf.cache import RowCache, cache_argument
from iiverl_core.rollout.hf.decode import Batch, Decoding, Submission
from iiverl_core.rollout.hf.model import build_model, stop_token_ids
from iiverl_core.rollout.hf.packed_weights import PackedWeights
from iiverl_core.rollout.weights import ExpectedWeights, compare, digest
from iiverl_core.training.adapter import adapted_layers, add_adapter, is_adapter


class HFEngine:
    """Sample with a causal LM of transformers. Implements `iiverl_core.rollout.RolloutEngine`.

    A prompt is computed once for the responses that are submitted together. A finished response leaves the batch, and a
    request that is submitted during decoding joins at the next step. Requests that wait when a batch begins are divided
    into batches of prompts of similar lengths, the longest first.

    The model is built from its configuration, without weights.
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
        adapters: ModelConfig | None = None,
        max_sequences: int = 1024,
        prompts_per_batch: int | None = None,
    ) -> None:
        """Build the model.

        Args:
            model_path: folder or Hub name of a causal LM; only its configuration is read.
            dtype: dtype of the weights.
            device: device of the engine.
            tokenizer_path: folder or Hub name of the tokenizer, by default the model's; its end-of-sentence token ends responses.
            trust_remote_code: run code that comes with the model.
            override_config: values that replace those of the model's `config.json`.
            adapters: the model with the LoRA adapters that the engine has beside its weights; None for an engine without.
            max_sequences: maximum number of responses decoded at a time. A prompt with more responses is computed
                once for each part of them.
            prompts_per_batch: maximum number of prompts whose responses are decoded at a time.

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
        if adapters is not None:
            add_adapter(self._model, adapters, self._model.get_output_embeddings())
            for layer in adapted_layers(self._model).values():  # as FSDP computes with them
                layer.lora_A.to(dtype)
                layer.lora_B.to(dtype)
        self._packed = PackedWeights(self._model)
        cache_argument(self._model)  # raises if the model takes no cache
        try:
            self._expected = ExpectedWeights(self._model)
        except ValueError as error:
            raise ConfigError(
                f"the rollout engine `hf` cannot be given the weights of '{model_path}': {error}"
            ) from error
        self._base = frozenset(name for name in self._expected.shapes if adapters and not is_adapter(name))
        self._has_base = False
        RowCache(self._model)  # raises if the model needs another kind of cache
        self._vocabulary: int = self._model.config.get_text_config().vocab_size
        stop_ids = stop_token_ids(
            model_path, tokenizer_path, self._model, trust_remote_code=trust_remote_code
        )
        self._decoding = Decoding(
            self._model,
            np.isin(np.arange(self._vocabulary), list(stop_ids)),
            direct_mask=use_grouped_sdpa(self._model),
        )
        self._waiting: list[Submission] = []
        self._joining: list[Submission] = []  # submitted since the batch that is being decoded began

    @property
    def pending(self) -> int:
        """See `RolloutEngine.pending`."""
        return len(self._waiting) + len(self._joining) + len(self._decoding)

    def submit(self, request: GenerationRequest, params: SamplingParams) -> None:
        """Queue a request; see `RolloutEngine.submit`.

        Unless `params.ignore_eos`, its response ends at any end-of-sentence token of the tokenizer, the model's
        generation config or its configuration.
        """
        if self.weights_version < 0:
            raise RuntimeError("the rollout engine has no weights: call update_weights before generate")
        check_request(request, params, self._vocabulary)
        (self._joining if len(self._decoding) else self._waiting).append(Submission(request, params))

    @torch.inference_mode()
    def step(self) -> list[Completion]:
        """Admit waiting requests and advance by one token; see `RolloutEngine.step`."""
        if not self.pending:
            return []
        try:
            return self._decoding.advance(self._admit(), self.weights_version)
        except BaseException:
            self._drop_all()
            raise

    @torch.inference_mode()
    def abort(self, requests: Collection[GenerationRequest]) -> None:
        """Drop these requests; see `RolloutEngine.abort`."""
        self._waiting = [each for each in self._waiting if each.request not in requests]
        self._joining = [each for each in self._joining if each.request not in requests]
        self._decoding.abort(requests)

    @torch.inference_mode()
    def interrupt(self) -> dict[GenerationRequest, GenerationRequest]:
        """Drop all pending requests, and return those that continue them; see `RolloutEngine.interrupt`."""
        waiting = {each.request: each.request for each in (*self._waiting, *self._joining)}
        continued = waiting | self._decoding.continued(self.weights_version)
        self._drop_all()
        return continued

    def _drop_all(self) -> None:
        self._waiting, self._joining = [], []
        self._decoding.clear()

    def _admit(self) -> list[Batch]:
        """Take the next requests to decode, in batches whose prompts have the same number of responses.

        Requests that waited when decoding began are not admitted before it ends. So requests that are submitted together
        are decoded together and get the same bits, whatever came before.
        """
        if not len(self._decoding):
            self._waiting, self._joining = self._waiting + self._joining, []
        source = self._joining if len(self._decoding) else self._waiting
        if not source:
            return []
        n_sequences, n_prompts = len(self._decoding), self._decoding.n_prompts
        admitted: list[Batch] = []
        while source:
            prompts: dict[tuple[object, ...], list[Submission]] = {}
            for each in source:
                prompts.setdefault(each.prompt, []).append(each)
            ordered = sorted(
                prompts.values(), key=lambda each: len(each[0].request.context_ids), reverse=True
            )
            count = min(len(ordered[0]), self._max_sequences)
            alike = [each[:count] for each in ordered if min(len(each), self._max_sequences) == count]
            room = (self._max_sequences - n_sequences) // count
            if self._prompts_per_batch is not None:
                room = min(room, self._prompts_per_batch - n_prompts)
            if room <= 0:
                break
            batch = alike[:room]
            admitted.append(batch)
            n_sequences, n_prompts = n_sequences + count * len(batch), n_prompts + len(batch)
            taken = {each.request for prompt in batch for each in prompt}
            source[:] = [each for each in source if each.request not in taken]
        return admitted

    def update_weights(
        self, weights: Iterable[tuple[str, Tensor]], version: int, *, verify: bool = True
    ) -> None:
        """Replace every weight by name, one tensor at a time; see `RolloutEngine.update_weights`.

        Tied weights may be given once. If this fails, the engine has no weights.
        """
        self._drop_all()
        self._packed.clear()
        self.weights_version = -1
        given: dict[str, int] = {}
        slots = self._expected.slots
        kept = self._base if self._has_base else ()
        self._has_base = False
        for name, value in self._expected.check(weights, optional=kept):
            self._set(slots[name], value)
            if verify:
                given[name] = digest(value.to(slots[name].dtype))
        compare("the engine", given, {name: [digest(slots[name])] for name in given})
        self._has_base = True
        self.weights_version = version

    @torch.no_grad()
    def _set(self, slot: Tensor, value: Tensor) -> None:
        slot.copy_(value)

    def release_cache(self) -> None:
        """Drop pending requests with their keys and values; see `RolloutEngine.release_cache`."""
        self.sleep()

    def sleep(self, *, discard_weights: bool = False) -> None:
        """Drop pending requests with their keys and values; see `RolloutEngine.sleep`."""
        self._drop_all()
        if discard_weights:
            self.weights_version, self._has_base = -1, False
            self._packed.clear()

    def close(self) -> None:
        """Drop pending requests and the weights; see `RolloutEngine.close`."""
        self.sleep(discard_weights=True)
