"""Generate in a worker process: a rollout engine with weights of its own, and rollouts made of its responses."""

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace

import torch
from torch import Tensor

from iiverl_core.cluster.messages import ReceivedWeights, WeightSync
from iiverl_core.config import RunConfig
from iiverl_core.data import load_image_processor, load_tokenizer
from iiverl_core.rollout import (
    RolloutRequest,
    RolloutRunner,
    RolloutTokens,
    Sampling,
    make_engine,
    make_rollouter,
    sampling_params,
)
from iiverl_core.rollout.weights import digest
from iiverl_core.samples import (
    Handle,
    Rollout,
    SampleId,
    SequenceImage,
    SequenceRef,
    Thumbnail,
    TokenSequence,
)

STREAM_INTERVAL_S = 0.1  # between yields, to send several finished rollouts together
NOT_STORED = Handle(None)


class Generator:
    """A rollout engine, or this process's part of one, that takes requests and gives rollouts.

    If an engine spans several devices, all its processes get the same calls, and the first yields the rollouts.
    """

    def __init__(self, run: RunConfig, device: torch.device, rank: int) -> None:
        """Build the engine, still without weights; consecutive ranks have one together.

        Raises:
            ConfigError: the engine is not installed or cannot run the model, there is no tokenizer, or the rollouter
                cannot do what the configuration asks for.
        """
        self._run = run
        self._tokenizer = load_tokenizer(run)
        self._images = load_image_processor(run)
        self._engine = make_engine(run, device)
        self._rollouter = make_rollouter(run, self._tokenizer)
        self._interrupted: dict[Sampling, RolloutRunner] = {}
        self._is_output_rank = rank % run.engine_devices == 0
        self._updated = False

    def update_weights(self, weights: Iterable[tuple[str, Tensor]], sync: WeightSync) -> ReceivedWeights:
        """Give the engine weights, each by name, and with `sync.verify` or the first time let it check that it has them.

        Raises as `RolloutEngine.update_weights` does.
        """
        nbytes = 0
        digests: dict[str, int] = {}

        def recorded() -> Iterator[tuple[str, Tensor]]:
            nonlocal nbytes
            for name, value in weights:
                nbytes += value.nbytes
                if sync.verify:
                    digests[name] = digest(value)
                yield name, value

        self._engine.update_weights(recorded(), sync.version, verify=sync.verify or not self._updated)
        self._updated = True
        return ReceivedWeights(sync, nbytes, digests)

    def sleep(self, discard_weights: bool) -> None:
        """Let the engine release the memory that only generating needs, and with `discard_weights` its weights'."""
        self._engine.sleep(discard_weights=discard_weights)

    def release_cache(self) -> None:
        """Let the engine release the memory of keys and values alone."""
        self._engine.release_cache()

    def close(self) -> None:
        """End the rollouter and the engine; see `RolloutEngine.close`."""
        for runner in self._interrupted.values():
            runner.close()
        self._rollouter.close()
        self._engine.close()

    def generate(
        self,
        requests: Sequence[RolloutRequest],
        sampling: Sampling,
        interrupted: Callable[[], bool] = lambda: False,
    ) -> Iterator[tuple[list[TokenSequence], list[Rollout]]]:
        """Make rollouts; yield the sequences of those that are finished, and the rollouts, in one order.

        Once `interrupted`, those that are unfinished wait for the next call with the same `sampling`, and go on if their
        requests are among its `requests`.

        A runtime puts the sequences into its store and passes the rollouts on (`attach_handles`). If a process
        stored them itself, they would be lost when it dies.
        """
        runner = self._interrupted.pop(sampling, None) or RolloutRunner(
            self._engine,
            self._rollouter,
            sampling_params(self._run, sampling),
            in_lockstep=self._run.trainer.deterministic,
        )
        finished: list[RolloutTokens] = []
        last = time.monotonic()
        requests = self._with_images(requests)
        images = {each.id: each.images for each in requests}
        with ExitStack() as stack:
            stack.callback(runner.close)
            for done in runner.run(requests, interrupted):
                if not self._is_output_rank:
                    continue
                finished.append(done)
                if time.monotonic() - last > STREAM_INTERVAL_S:
                    yield self._rollouts(finished, images)
                    finished = []
                    last = time.monotonic()
            if runner.unfinished:
                self._interrupted[sampling] = runner
                stack.pop_all()
        if finished:
            yield self._rollouts(finished, images)

    def _with_images(self, requests: Sequence[RolloutRequest]) -> Sequence[RolloutRequest]:
        """Prepare the images of prompts, once for all responses to a prompt."""
        if self._images is None:
            return requests
        prepared = {(each.id[:-1]): each.prompt for each in requests}
        images = {group: self._images.prepare_prompt(prompt) for group, prompt in prepared.items()}
        return [replace(each, images=images[each.id[:-1]]) for each in requests]

    def _rollouts(
        self,
        finished: Sequence[RolloutTokens],
        prompt_images: Mapping[SampleId, Sequence[SequenceImage]],
    ) -> tuple[list[TokenSequence], list[Rollout]]:
        ids = [done.response_ids.tolist() for done in finished]
        texts = self._tokenizer.batch_decode(ids, skip_special_tokens=True)
        raw_texts = self._tokenizer.batch_decode(ids, clean_up_tokenization_spaces=False)
        rollouts = [
            Rollout(
                id=done.id,
                prompt=done.prompt.tokens_only(),
                text=text,
                raw_text=raw_text,
                finish_reason=done.finish_reason,
                weights_version=done.weights_version,
                log_prob=sum(float(each.log_probs[each.loss_mask].sum()) for each in done.sequences),
                sequences=tuple(
                    SequenceRef(
                        done.id,
                        NOT_STORED,
                        len(each.token_ids),
                        each.trained,
                        prefix=each.prefix_of(done.prompt.ids, prompt_images[done.id]),
                    )
                    for each in done.sequences
                ),
                outcome=done.outcome,
                messages=done.messages,
                turns=done.turns,
                counts=done.counts,
                images=tuple(
                    Thumbnail(each.digest.hex(), each.thumbnail) for each in done.images if each.thumbnail
                ),
                spans=done.spans,
            )
            for done, text, raw_text in zip(finished, texts, raw_texts, strict=True)
        ]
        return [each for done in finished for each in done.sequences], rollouts
