"""How fast a backend trains, and how fast it computes log-probs."""

from dataclasses import replace

import numpy as np
import torch
from transformers import AutoConfig

from gpu_check_parts.setting import NotPossibleError, Numbers, Setting, one_process
from iiverl_core.algorithms import find_policy_loss
from iiverl_core.algorithms.rollout_correction import RolloutCorrection
from iiverl_core.cluster.model_runner import model_spec
from iiverl_core.config import Role, RunConfig
from iiverl_core.registry import BACKENDS
from iiverl_core.samples import ROLLOUT_LOG_PROBS, TokenSequence
from iiverl_core.telemetry import mfu, training_flops
from iiverl_core.training import MicroBatch, TrainingBackend
from iiverl_core.training.aggregation import token_weights
from iiverl_core.training.batching import make_micro_batch
from iiverl_core.training.losses import actor_loss
from iiverl_core.training.planning import Packing, SequenceSize, Work, micro_batches


def train(setting: Setting, *, packed: bool, offload: bool = False, backend: str = "fsdp") -> Numbers:
    """Measure forward, backward and step of the actor, and its log-probs, in bf16 with fp32 master weights."""
    if offload and setting.device.type == "cpu":
        raise NotPossibleError("there is no device to offload from")
    run = setting.configure(packed=packed, offload=offload, backend=backend)
    sequences = setting.sequences()
    with one_process(setting.device):
        actor = make_backend(run, "actor", setting.device)
        batches = cut(setting, sequences, packed=packed)
        loss = actor_loss(run.loss, find_policy_loss("vanilla"), RolloutCorrection())

        def step() -> None:
            actor.forward_backward(batches, loss, entropy=True)
            if not actor.step(lr=1e-6).taken:
                raise FloatingPointError("the gradient is not finite")

        seconds = setting.seconds(step)
        peak = setting.peak()
        forward = setting.seconds(lambda: actor.forward(batches))
        tokens = sum(lengths(sequences))
        share = _mfu(setting, actor.parameter_count(), lengths(sequences), seconds)
    return {"train tokens/s": tokens / seconds, **share, "log-prob tokens/s": tokens / forward, **peak}


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


def cut(setting: Setting, sequences: list[TokenSequence], *, packed: bool) -> list[MicroBatch]:
    """Cut sequences into micro-batches of the size's token budget, with all that the actor's loss reads but the KL's."""
    rng = np.random.default_rng(1)
    responses = [each.trained for each in sequences]
    weights = token_weights("token-mean", responses, setting.size.longest_response)
    advantages = [rng.normal(size=n).astype(np.float32) for n in responses]
    sizes = [SequenceSize(n) for n in lengths(sequences)]
    packing = Packing(tokens=setting.size.tokens, layout="packed" if packed else "padded")
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
