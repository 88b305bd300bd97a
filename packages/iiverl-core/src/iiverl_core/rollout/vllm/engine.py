"""The rollout engine `vllm`: vLLM in this process, with weights that are handed over and verified."""

import logging
import random
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from hashlib import blake2b
from itertools import chain
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import BatchFeature

from iiverl_core.config import ModelConfig
from iiverl_core.errors import NonFiniteError, join_names
from iiverl_core.rollout.engine import Completion, GenerationRequest, SamplingParams, check_request
from iiverl_core.rollout.hf.model import build_model, stop_token_ids
from iiverl_core.rollout.vllm.arguments import WITH_IMAGES
from iiverl_core.rollout.vllm.start import LOWEST_TEMPERATURE, import_vllm, start
from iiverl_core.rollout.weights import ExpectedWeights, compare, digest, raise_mismatch
from iiverl_core.samples import KeptTokens
from iiverl_core.training.adapter import adapted_layers, add_adapter, is_adapter, write_adapter
from iiverl_core.training.vision import reads_images, reads_tiles

BUCKET_BYTES = 2**29
WEIGHTS, CACHE = "weights", "kv_cache"  # vLLM's names for what sleeps


@dataclass
class _Pending:
    """An unfinished request, and if the engine may be interrupted, what is written of its response since it was submitted."""

    request: GenerationRequest
    params: SamplingParams
    token_ids: list[int] = field(default_factory=list)
    log_probs: list[float] = field(default_factory=list)
    kept: list[Sequence[int]] = field(default_factory=list)

    def add(self, response: Any) -> None:
        """Append what vLLM has written."""
        self.token_ids += response.token_ids
        self.log_probs += response.logprobs.logprobs
        if response.sampling_mask:
            self.kept += response.sampling_mask.token_ids

    def response(self) -> tuple[np.ndarray, np.ndarray, KeptTokens | None]:
        """Return tokens, log-probs, and the tokens that top-k and top-p kept, of the whole response so far."""
        token_ids = np.array(self.token_ids, dtype=np.int64)
        log_probs = np.array(self.log_probs, dtype=np.float32)
        if self.params.temperature == 0:
            log_probs = np.zeros_like(log_probs)
        kept = _kept(self.kept) if self.params.truncates and self.kept else None
        if (before := self.request.written) is not None:
            token_ids = np.concatenate([before.token_ids, token_ids])
            log_probs = np.concatenate([before.log_probs, log_probs])
            kept = before.kept if kept is None else _joined(before.kept, kept)
        return token_ids, log_probs, kept


class VLLMEngine:
    """Sample with vLLM. Implements `iiverl_core.rollout.RolloutEngine`.

    The engine lives in this process and starts without weights. With a `tensor_parallel_size` above 1 it is spread over
    that many consecutive processes of the torch.distributed group that they have joined. All of them build it at the
    same time and call the same methods in the same order with equal arguments; each is given all weights, takes and
    verifies its shards, and gets all responses. A sleeping engine wakes when it is used; an update wakes only its weights.

    A response's random numbers depend on its request's seed and member alone. The last bits of logits depend on the
    batch, whose size decides the order in which kernels sum. So the same requests in the same order have the same
    responses; in another batch, a response may differ from where two tokens are almost equally likely.
    """

    def __init__(
        self,
        arguments: Mapping[str, Any],
        *,
        colocated: bool = False,
        tokenizer_path: str | None = None,
        adapters: ModelConfig | None = None,
        bucket_bytes: int = BUCKET_BYTES,
        interruptible: bool = False,
    ) -> None:
        """Start vLLM.

        Args:
            arguments: of `vllm.LLM`, from `engine_arguments`.
            colocated: the model is trained in this process as well.
            tokenizer_path: folder or Hub name of the tokenizer, by default the model's; its end-of-sentence token ends responses.
            adapters: the model with the LoRA adapters that the engine has beside its weights; None for an engine without.
            bucket_bytes: weights are handed over together once they have this many bytes.
            interruptible: `interrupt` may be called, for which vLLM reports every token as it is sampled.

        Raises:
            ConfigError: vLLM is missing or not supported, or cannot run the model with these arguments.
        """
        self.weights_version = -1
        self._listed_unclaimed = False
        self._bucket_bytes = bucket_bytes
        self._submitted = 0
        self._pending: dict[str, _Pending] = {}
        """Unfinished requests by their id in vLLM."""
        self._interruptible = interruptible
        self._returns_kept = bool(arguments.get("return_sampling_mask"))
        self._can_sleep: bool = arguments.get("enable_sleep_mode", False)
        self._asleep: set[str] = set()

        self._vllm = import_vllm()
        path, trust = arguments["model"], arguments.get("trust_remote_code", False)
        model = build_model(
            path,
            dtype=torch.float32,
            device=torch.device("meta"),
            trust_remote_code=trust,
            override_config=arguments.get("hf_overrides"),
        )
        if adapters is not None:
            add_adapter(model, adapters, model.get_output_embeddings())
            # Others, such as experts, would be prepared for adapters as well.
            layers = sorted({name.rpartition(".")[2] for name in adapted_layers(model)})
            arguments = {**arguments, "lora_target_modules": layers}
        self._config = model.config
        if reads_images(model.config):
            arguments = {**arguments, **WITH_IMAGES}
            if tokenizer_path is not None:
                arguments = {**arguments, "tokenizer": tokenizer_path}
        self._adapters, self._loaded_adapters = adapters, 0
        self._adapter: Any = None
        self._adapter_folder: TemporaryDirectory[str] | None = None
        self._has_base = False
        self._expected = ExpectedWeights(model)
        shapes = self._expected.shapes.items()
        self._shapes = {name: tuple(shape) for name, shape in shapes if not (adapters and is_adapter(name))}
        self._vocabulary: int = model.config.get_text_config().vocab_size
        self._stop_ids = sorted(stop_token_ids(path, tokenizer_path, model, trust_remote_code=trust))
        threads = torch.get_num_threads()
        with _restored_generators():
            self._llm = start(self._vllm, arguments, colocated=colocated)
        if torch.cuda.is_available():
            # vLLM leaves this process one thread, while the trainer may have an optimizer on the CPU.
            torch.set_num_threads(threads)
        self._max_length: int = self._llm.model_config.max_model_len
        (self._shards,) = self._llm.collective_rpc("iiverl_weight_shards", args=(self._shapes,))

    @property
    def pending(self) -> int:
        """See `RolloutEngine.pending`."""
        return len(self._pending)

    def submit(self, request: GenerationRequest, params: SamplingParams) -> None:
        """Queue a request; see `RolloutEngine.submit`.

        Requests are admitted in order. Unless `params.ignore_eos`, a response ends at any end-of-sentence token of the
        tokenizer, the model's generation config or its configuration.

        Raises:
            RuntimeError: the engine has no weights.
            ValueError: the prompt is empty, too long or holds an unknown token, or `params` are out of range.
        """
        if self.weights_version < 0:
            raise RuntimeError("the rollout engine has no weights: call update_weights before generate")
        check_request(request, params, self._vocabulary)
        self._check(request, params)
        self.wake()
        greedy = params.temperature == 0
        temperature, top_k = params.temperature, max(params.top_k, 0)
        if self._returns_kept:  # for which vLLM wants both to be set
            temperature, top_k = (1.0, 1) if greedy else (temperature, top_k or self._vocabulary)
        name, output_kind = str(self._submitted), self._vllm.sampling_params.RequestOutputKind
        self._llm.llm_engine.add_request(
            name,
            self._input(request),
            self._vllm.SamplingParams(
                temperature=temperature,
                top_k=top_k if self._returns_kept or not greedy else 0,
                top_p=1.0 if greedy else params.top_p,
                max_tokens=params.max_tokens - request.written_length,
                seed=None if greedy else _seed(request.seed, request.id.member, request.written_length),
                stop_token_ids=[] if params.ignore_eos else self._stop_ids,
                ignore_eos=True,  # the ids above are complete
                logprobs=0,  # of the sampled token alone
                flat_logprobs=True,
                detokenize=False,
                output_kind=output_kind.DELTA if self._interruptible else output_kind.FINAL_ONLY,
            ),
            lora_request=self._adapter,
        )
        self._submitted += 1
        self._pending[name] = _Pending(request, params)

    def _input(self, request: GenerationRequest) -> Any:
        """Return a prompt as vLLM's own processor would, so that its tokens and pixels are exactly those of the trainer."""
        ids, images = list(request.context_ids), [each.image for each in request.images]
        if not images:
            return self._vllm.inputs.tokens_input(ids)
        from vllm.inputs.engine import mm_input
        from vllm.multimodal.inputs import MultiModalFieldConfig, MultiModalKwargsItems, PlaceholderRange

        pixels = torch.from_numpy(np.concatenate([image.pixel_values for image in images]))
        if reads_tiles(self._config):
            tiles = torch.tensor([len(image.pixel_values) for image in images])
            inputs = {"image_num_patches": tiles, "image_token_id": torch.tensor(self._config.image_token_id)}
            fields = {
                "pixel_values": MultiModalFieldConfig.flat_from_sizes("image", tiles),
                "image_num_patches": MultiModalFieldConfig.batched("image", keep_on_cpu=True),
                "image_token_id": MultiModalFieldConfig.shared("image", len(images), keep_on_cpu=True),
            }
        else:
            grids = torch.from_numpy(np.stack([image.grid for image in images]))
            inputs = {"image_grid_thw": grids}
            fields = {
                "pixel_values": MultiModalFieldConfig.flat_from_sizes("image", grids.prod(-1)),
                "image_grid_thw": MultiModalFieldConfig.batched("image", keep_on_cpu=True),
            }
        items = MultiModalKwargsItems.from_hf_inputs(BatchFeature({"pixel_values": pixels, **inputs}), fields)
        # vLLM shares the features of images with the same name; they are those of the current weights.
        names = [f"{image.digest.hex()}-{self.weights_version}" for image in images]
        places = [PlaceholderRange(offset=start, length=image.tokens) for start, image in request.images]
        return mm_input(ids, items, {"image": names}, {"image": places})

    def step(self) -> list[Completion]:
        """Let vLLM schedule and advance requests; see `RolloutEngine.step`."""
        if not self._pending:
            return []
        try:
            outputs = self._step()
            for each in outputs:
                self._pending[each.request_id].add(each.outputs[0])
            return [self._completion(each) for each in outputs if each.finished]
        except BaseException:
            self._drop_all()
            raise

    def abort(self, requests: Collection[GenerationRequest]) -> None:
        """Drop these requests; see `RolloutEngine.abort`."""
        names = [name for name, each in self._pending.items() if each.request in requests]
        if names:
            self._llm.llm_engine.abort_request(names)
            for name in names:
                del self._pending[name]

    def interrupt(self) -> dict[GenerationRequest, GenerationRequest]:
        """Drop all pending requests, and return those that continue them; see `RolloutEngine.interrupt`."""
        if not self._interruptible:
            raise RuntimeError("the engine was not built to be interrupted")
        for each in list(self._pending.values()):
            self._check_finite(each)
        continued = {
            each.request: each.request.continued(*each.response(), self.weights_version)
            for each in self._pending.values()
        }
        self._drop_all()
        return continued

    def _drop_all(self) -> None:
        self.abort({each.request for each in self._pending.values()})

    def _step(self) -> list[Any]:
        # vLLM draws from the generators of torch and numpy even if every request has a seed.
        with _restored_generators(devices=[]):
            return self._llm.llm_engine.step()

    def _completion(self, output: Any) -> Completion:
        pending = self._pending.pop(output.request_id)
        request, reason = pending.request, output.outputs[0].finish_reason
        if reason not in ("stop", "length"):
            raise RuntimeError(f"vLLM aborted the response to request {request.id}: {reason}")
        self._check_finite(pending)
        token_ids, log_probs, kept = pending.response()
        return Completion(request, token_ids, log_probs, reason, self.weights_version, kept)

    def _check_finite(self, pending: _Pending) -> None:
        finite = np.isfinite(pending.log_probs)
        if not finite.all():
            self._drop_all()
            # Attention multiplies masked values by zero, so a NaN left in the cache would spread to the next user of its block.
            self._llm.collective_rpc("iiverl_clear_cache")
            token = pending.request.written_length + int(finite.argmin()) + 1
            raise NonFiniteError(
                f"The model gives logits that are not finite, at token {token} of the response to request "
                f"{pending.request.id}. The weights may have diverged, or their dtype may be too narrow: look at "
                "actor/grad_norm, try rollout.dtype: bfloat16 or float32."
            )

    def update_weights(
        self, weights: Iterable[tuple[str, Tensor]], version: int, *, verify: bool = True
    ) -> None:
        """Replace every weight by name, a bucket at a time; see `RolloutEngine.update_weights`.

        Tied weights may be given once. The cache of prompts is cleared. If this fails, the engine has no weights.

        Raises:
            ValueError: a name or a shape does not fit, or a weight of the engine was left out.
            WeightMismatchError: the weights that the engine computes with differ from those it was given.
        """
        self._drop_all()
        self.weights_version = -1
        self._wake(WEIGHTS)
        kept = self._shapes.keys() if self._has_base and self._adapters else ()
        self._has_base = False
        adapter: dict[str, Tensor] = {}
        base = self._without_adapter(self._expected.check(weights, optional=kept), adapter)
        first = next(base, None)
        if first is not None:
            self._load(chain([first], base), verify=verify)
        if self._adapters is not None:
            self._load_adapter(self._adapters, adapter, verify=verify)
        self._has_base = True
        if not self._llm.reset_prefix_cache():
            raise RuntimeError(
                "vLLM did not clear its cache of prompts, which was computed with older weights"
            )
        self.weights_version = version

    def _without_adapter(
        self, weights: Iterable[tuple[str, Tensor]], adapter: dict[str, Tensor]
    ) -> Iterator[tuple[str, Tensor]]:
        for name, value in weights:
            if name in self._shapes:
                yield name, value
            else:
                adapter[name] = value.detach().clone()

    def _load_adapter(self, config: ModelConfig, weights: Mapping[str, Tensor], *, verify: bool) -> None:
        """Let vLLM read an adapter from a folder, under a new number, in place of the one before."""
        from vllm.lora.request import LoRARequest

        folder = TemporaryDirectory(prefix="iiverl-adapter-")
        write_adapter(weights, config, Path(folder.name), task="CAUSAL_LM")
        if self._adapter is not None:
            self._llm.llm_engine.remove_lora(self._loaded_adapters)
        self._loaded_adapters += 1
        number = self._loaded_adapters
        self._adapter = LoRARequest(lora_name=f"adapter-{number}", lora_int_id=number, lora_path=folder.name)
        self._llm.llm_engine.add_lora(self._adapter)
        self._adapter_folder = folder  # the one before is removed
        if verify:
            (wrong,) = self._llm.collective_rpc("iiverl_wrong_adapters", args=(weights, config.lora_scale))
            raise_mismatch("vLLM", wrong, len(weights))

    def _load(self, weights: Iterable[tuple[str, Tensor]], *, verify: bool) -> None:
        from iiverl_core.rollout.vllm.transfer import buckets  # imports vLLM

        given: dict[str, int] = {}
        self._llm.start_weight_update()
        try:
            for bucket in buckets(self._recorded(weights, given) if verify else weights, self._bucket_bytes):
                self._llm.update_weights({"update_info": bucket})
        except BaseException:
            with suppress(RuntimeError):  # vLLM has closed the update itself if its own loading failed
                self._llm.finish_weight_update()
            raise
        self._llm.finish_weight_update()
        if verify:
            self._compare(given)

    def _recorded(
        self, weights: Iterable[tuple[str, Tensor]], given: dict[str, int]
    ) -> Iterator[tuple[str, Tensor]]:
        for name, value in weights:
            if name in self._shards:
                given[name] = digest(self._shards[name].of(value))
            yield name, value

    def _compare(self, given: Mapping[str, int]) -> None:
        if not self._listed_unclaimed:
            self._listed_unclaimed = True
            (unseen,) = self._llm.collective_rpc("iiverl_unclaimed", args=(self._shapes,))
            if unseen:
                logging.getLogger(__name__).warning(
                    "these weights of vLLM cannot be verified: %s", join_names(unseen)
                )
        (held,) = self._llm.collective_rpc("iiverl_weight_digests", args=(self._shapes,))
        compare("vLLM", given, held)

    def sleep(self, *, discard_weights: bool = False) -> None:
        """Release the device memory of weights, keys and values; see `RolloutEngine.sleep`.

        The weights are kept in the host's memory, or with `discard_weights` not at all. The cache of prompts is
        cleared. If vLLM cannot sleep (on a CPU, or without `enable_sleep_mode`), the memory stays allocated; everything
        else is the same.
        """
        self._drop_all()
        self._llm.reset_prefix_cache()
        if discard_weights:
            self.weights_version, self._has_base = -1, False
        if self._can_sleep and WEIGHTS not in self._asleep:
            self._llm.sleep(level=2 if discard_weights else 1)
        self._asleep = {WEIGHTS, CACHE}

    def release_cache(self) -> None:
        """Release the device memory of keys and values; see `RolloutEngine.release_cache`.

        The cache of prompts is cleared. As with `sleep`, nothing is released where vLLM cannot sleep.
        """
        self._drop_all()
        self._llm.reset_prefix_cache()
        if self._can_sleep and not self._asleep:
            self._finish_steps()
            self._llm.sleep(level=0)
            self._llm.release_kv_cache_memory()
        self._asleep |= {CACHE}

    def _finish_steps(self) -> None:
        """Let vLLM take the results of steps that it has begun, and forget requests that have ended, without which it refuses."""
        core = self._llm.llm_engine.engine_core.engine_core
        while core.scheduler.has_requests() or core.batch_queue:
            self._step()

    def wake(self) -> None:
        """Reallocate the memory that `sleep` released; weights that were discarded have to be updated."""
        self._wake(WEIGHTS, CACHE)

    def _wake(self, *names: str) -> None:
        waking = self._asleep & set(names)
        if self._can_sleep and waking:
            self._llm.wake_up(sorted(waking, reverse=True))
        self._asleep -= waking

    def close(self) -> None:
        """Shut vLLM down, and with it torch.distributed in this process; see `RolloutEngine.close`.

        Otherwise vLLM does so when the process ends, and fails if that has left torch.distributed by then.
        """
        self.weights_version = -1
        # Requests end with vLLM, which may be unable to abort them.
        self._pending.clear()
        self._llm.llm_engine.engine_core.shutdown()

    def _check(self, request: GenerationRequest, params: SamplingParams) -> None:
        if 0 < params.temperature < LOWEST_TEMPERATURE:
            raise ValueError(
                f"vLLM cannot sample at temperature {params.temperature}: use 0, or at least {LOWEST_TEMPERATURE}"
            )
        needed = len(request.prompt_ids) + params.max_tokens
        if needed > self._max_length:
            raise ValueError(
                f"request {request.id} has {len(request.prompt_ids)} tokens and asks for {params.max_tokens} more; "
                f"this engine was started for {self._max_length} in all (rollout.max_model_len)"
            )


def _kept(token_ids: Sequence[Sequence[int]]) -> KeptTokens:
    return KeptTokens(
        np.array([id for ids in token_ids for id in ids], dtype=np.int32),
        np.array([len(ids) for ids in token_ids], dtype=np.int32),
    )


def _joined(before: KeptTokens | None, after: KeptTokens) -> KeptTokens:
    if before is None:
        return after
    return KeptTokens(np.concatenate([before.ids, after.ids]), np.concatenate([before.counts, after.counts]))


def _seed(seed: int, member: int, written: int) -> int:
    """Derive the seed of one response, so that neighbouring seeds and members do not collide.

    A response that goes on after `written` tokens has another one: vLLM starts its generator again.
    """
    name = f"{seed}/{member}" + (f"/{written}" if written else "")
    return int.from_bytes(blake2b(name.encode(), digest_size=8).digest()) >> 1


@contextmanager
def _restored_generators(devices: Sequence[int] | None = None) -> Iterator[None]:
    """Restore the generators of this process, which vLLM draws from, and seeds when it starts.

    These are Python's, numpy's and torch's for the CPU and for `devices`, by default all.
    """
    python, numpy = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng(devices=devices):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
