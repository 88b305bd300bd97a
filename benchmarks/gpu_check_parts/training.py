"""How fast a backend trains, how fast it computes log-probs, and how much memory that takes."""

import statistics
import time
from collections.abc import Hashable, Sequence
from dataclasses import replace
from functools import partial

import numpy as np
import torch
from transformers import AutoConfig

from gpu_check_parts.setting import FIRST, GIB, TOLERANCE, NotPossibleError, Numbers, Setting, one_process
from iiverl_core.algorithms import find_policy_loss
from iiverl_core.algorithms.rollout_correction import RolloutCorrection
from iiverl_core.cluster.model_runner import model_spec
from iiverl_core.config import Role, RunConfig
from iiverl_core.memory.plan import find_facts, plan_memory
from iiverl_core.registry import BACKENDS
from iiverl_core.samples import ROLLOUT_LOG_PROBS, TokenSequence
from iiverl_core.telemetry import mfu, training_flops
from iiverl_core.training import MicroBatch, TrainingBackend
from iiverl_core.training.aggregation import token_weights
from iiverl_core.training.batching import make_micro_batch
from iiverl_core.training.losses import actor_loss
from iiverl_core.training.planning import Packing, SequenceSize, Work, micro_batches

GROUP = 8  # responses behind a shared prompt


def train(
    setting: Setting, *, packed: bool, offload: bool = False, backend: str = "fsdp", lora_rank: int = 0
) -> Numbers:
    """Measure forward, backward and step of the actor, and its log-probs, in bf16 with fp32 master weights.

    The plan's memory is for sequences of full length, so that it is more than what is measured. With `lora_rank`, only
    adapters are trained, and the other weights are in bf16.
    """
    if offload and setting.device.type == "cpu":
        raise NotPossibleError("there is no device to offload from")
    run = setting.configure(packed=packed, offload=offload, backend=backend, lora_rank=lora_rank)
    sequences = setting.sequences()
    with one_process(setting.device):
        actor = make_backend(run, "actor", setting.device)
        batches = cut(setting, sequences, packed=packed)
        seconds = setting.seconds(lambda: step(run, actor, batches))
        peak = setting.peak()
        forward = setting.seconds(lambda: actor.forward(batches))
        tokens = sum(lengths(sequences))
        share = _mfu(setting, actor.parameter_count(), lengths(sequences), seconds)
    planned = {"planned GiB": _planned(run) / GIB} if peak else {}
    return {
        "train tokens/s": tokens / seconds,
        **share,
        "log-prob tokens/s": tokens / forward,
        **peak,
        **planned,
    }


def shared_prompts(setting: Setting) -> Numbers:
    """Measure training on groups of responses with long prompts: one copy of a group's prompt, or one per response.

    Both alternate, with the same weights. Log-probs must agree within bf16's rounding.
    """
    run, size = setting.configure(), setting.size
    rng = np.random.default_rng(2)
    vocabulary = size.shape["vocab_size"]
    sequences: list[TokenSequence] = []
    for _ in range(size.sequences // GROUP):
        prompt = rng.integers(FIRST, vocabulary, size.longest_prompt)
        for length in rng.integers(size.longest_prompt // 4, size.longest_prompt, GROUP):
            response = rng.integers(FIRST, vocabulary, length)
            sequences.append(TokenSequence.single_turn(prompt, response, np.zeros(length, np.float32)))
    groups = [i // GROUP for i in range(len(sequences))]
    with one_process(setting.device):
        actor = make_backend(run, "actor", setting.device)
        layouts = {
            "shared": cut(setting, sequences, packed=True, groups=groups),
            "apart": cut(setting, sequences, packed=True),
        }
        log_probs = {name: _log_probs(actor, batches, sequences) for name, batches in layouts.items()}
        seconds: dict[str, list[float]] = {name: [] for name in layouts}
        for _ in range(setting.repeats):
            for name, batches in layouts.items():
                took = setting.seconds(partial(step, run, actor, batches), warm_up=not seconds[name], times=1)
                seconds[name].append(took)
    median = {name: statistics.median(each) for name, each in seconds.items()}
    difference = np.abs(log_probs["shared"] - log_probs["apart"])
    off = float(difference.max() / np.abs(log_probs["apart"]).max())
    if not off < TOLERANCE:
        raise ValueError(f"log-probs with shared prompts are off by {off:.2%}")
    tokens = sum(lengths(sequences))
    return {
        "train tokens/s, shared": tokens / median["shared"],
        "one prompt per response": tokens / median["apart"],
        "ratio": median["apart"] / median["shared"],
        "log-probs off by %": 100 * off,
        **setting.peak(),
    }


def compiled(setting: Setting) -> Numbers:
    """Measure training and log-probs with compiled blocks and without, in turn, and how long compiling takes.

    Log-probs must agree within bf16's rounding.
    """
    runs = {"eager": setting.configure(), "compiled": setting.configure(compile_blocks=True)}
    sequences, numbers = setting.sequences(), {}
    tokens = sum(lengths(sequences))
    batches = cut(setting, sequences, packed=True)
    train_s: dict[str, list[float]] = {name: [] for name in runs}
    forward_s: dict[str, list[float]] = {name: [] for name in runs}
    with one_process(setting.device):
        actors: dict[str, TrainingBackend] = {}
        for name, run in runs.items():
            started = time.perf_counter()
            actors[name] = make_backend(run, "actor", setting.device)
            numbers[f"s to build, {name}"] = time.perf_counter() - started
        log_probs = {name: _log_probs(actor, batches, sequences) for name, actor in actors.items()}
        for name, actor in actors.items():
            setting.forget_peak()
            before = setting.peak()
            step(runs[name], actor, batches)
            for key, peak in setting.peak().items():
                numbers[f"{key} of a step, {name}"] = peak - before[key]
        for _ in range(setting.repeats):
            for name, actor in actors.items():
                train = partial(step, runs[name], actor, batches)
                train_s[name].append(setting.seconds(train, warm_up=False, times=1))
                forward = partial(actor.forward, batches)
                forward_s[name].append(setting.seconds(forward, warm_up=not forward_s[name], times=1))
    off = np.abs(log_probs["compiled"] - log_probs["eager"]).max() / np.abs(log_probs["eager"]).max()
    if not off < TOLERANCE:
        raise ValueError(f"log-probs of compiled blocks are off by {off:.2%}")
    train_median = {name: statistics.median(each) for name, each in train_s.items()}
    forward_median = {name: statistics.median(each) for name, each in forward_s.items()}
    return {
        **{f"train tokens/s, {name}": tokens / each for name, each in train_median.items()},
        "ratio": train_median["eager"] / train_median["compiled"],
        **{f"log-prob tokens/s, {name}": tokens / each for name, each in forward_median.items()},
        "log-prob ratio": forward_median["eager"] / forward_median["compiled"],
        "compiling s": numbers["s to build, compiled"] - numbers["s to build, eager"],
        **numbers,
        "log-probs off by %": 100 * float(off),
    }


def step(run: RunConfig, actor: TrainingBackend, batches: list[MicroBatch]) -> None:
    """Make an optimizer step of the actor."""
    loss = actor_loss(run.loss, find_policy_loss("vanilla"), RolloutCorrection())
    actor.forward_backward(batches, loss, entropy=True, entropy_gradient=False)
    if not actor.step(lr=1e-6).taken:
        raise FloatingPointError("the gradient is not finite")


def _log_probs(
    actor: TrainingBackend, batches: list[MicroBatch], sequences: list[TokenSequence]
) -> np.ndarray:
    """Compute log-probs of all sequences, in their order."""
    place = {id(sequence): i for i, sequence in enumerate(sequences)}
    found: list[np.ndarray] = [np.zeros(0)] * len(sequences)
    for output, batch in zip(actor.forward(batches), batches, strict=True):
        assert output.log_probs_T is not None
        ends = np.cumsum([sequence.trained for sequence in batch.sequences])[:-1]
        parts = np.split(output.log_probs_T.float().cpu().numpy(), ends)
        for sequence, part in zip(batch.sequences, parts, strict=True):
            found[place[id(sequence)]] = part
    return np.concatenate(found)


def _planned(run: RunConfig) -> int:
    """Count the memory of the actor's update as `iiverl plan` does, in bytes."""
    plan = plan_memory(run, find_facts(run), torch.cuda.get_device_properties(0).total_memory)
    return next(role.most for role in plan.roles if role.role == "actor")


def reference(setting: Setting) -> Numbers:
    """Measure the log-probs of the reference, whose weights are in bf16."""
    sequences = setting.sequences()
    with one_process(setting.device):
        model = make_backend(setting.configure(), "reference", setting.device)
        batches = cut(setting, sequences, packed=True)
        seconds = setting.seconds(lambda: model.forward(batches))
        return {"log-prob tokens/s": sum(lengths(sequences)) / seconds, **setting.peak()}


def make_backend(
    run: RunConfig, role: Role, device: torch.device, *, trained: bool = True
) -> TrainingBackend:
    """Build one of the run's models; without its optimizer where it is not `trained`."""
    spec = model_spec(run.roles[role], device)
    return BACKENDS[run.backend].load()(spec if trained else replace(spec, optim=None))


def cut(
    setting: Setting, sequences: list[TokenSequence], *, packed: bool, groups: Sequence[Hashable] = ()
) -> list[MicroBatch]:
    """Cut sequences into micro-batches of the size's token budget, with all that the actor's loss reads but the KL's.

    Those of one of `groups` share the prompt.
    """
    rng = np.random.default_rng(1)
    responses = [each.trained for each in sequences]
    weights = token_weights("token-mean", responses, setting.size.longest_response)
    advantages = [rng.normal(size=n).astype(np.float32) for n in responses]
    sizes = [SequenceSize(n) for n in lengths(sequences)]
    if groups:
        prompts = [int(np.argmax(each.loss_mask)) for each in sequences]
        sizes = [
            SequenceSize(n, prompt, group)
            for n, prompt, group in zip(lengths(sequences), prompts, groups, strict=True)
        ]
    packing = Packing(
        tokens=setting.size.tokens, layout="shared" if groups else "packed" if packed else "padded"
    )
    plan = micro_batches(sizes, [range(len(sizes))], packing)
    return [
        make_micro_batch(
            [sequences[i] for i in positions],
            {
                "advantages": [advantages[i] for i in positions],
                ROLLOUT_LOG_PROBS: [sequences[i].log_probs[sequences[i].loss_mask] for i in positions],
            },
            [weights[i] for i in positions],
            inv_num_tokens=1 / sum(responses),
            groups=[groups[i] for i in positions] if groups else (),
            device=setting.device,
        )
        for positions in plan[0]
    ]


def lengths(sequences: list[TokenSequence]) -> list[int]:
    """Count the tokens of each sequence."""
    return [len(each.token_ids) for each in sequences]


def _mfu(setting: Setting, parameters: int, total: list[int], seconds: float) -> Numbers:
    if setting.device.type != "cuda":
        return {}
    shape = AutoConfig.from_pretrained(setting.model)
    heads = shape.num_attention_heads
    flops = training_flops(
        parameters,
        shape.num_hidden_layers,
        heads,
        shape.hidden_size // heads,
        [Work(n, n * n) for n in total],
    )
    share = mfu(flops, seconds, torch.cuda.get_device_name(), 1)
    return {} if share is None else {"MFU %": 100 * share}
