"""How fast an engine generates and takes new weights, and how far its log-probs are from the trainer's."""

from importlib.util import find_spec
from itertools import count

import torch

from gpu_check_parts.setting import GIB, NotPossibleError, Numbers, Setting, one_process
from gpu_check_parts.training import cut, make_backend
from iiverl_core.algorithms.rollout_correction import mismatch
from iiverl_core.rollout import GenerationRequest, SamplingParams, generate, make_engine
from iiverl_core.samples import ROLLOUT_LOG_PROBS, SampleId, TokenSequence
from iiverl_core.training import TrainingBackend

RESPONSES = 4
HIGHEST_KL = 0.05  # in nats a token; far above what bf16 costs, far below what other weights would give


def rollout(setting: Setting, *, engine: str) -> Numbers:
    """Measure weight updates and generation, and compare log-probs with the trainer's.

    What is compared was generated after a sleep and another update, so that what sleeping loses would be seen.
    """
    if engine == "vllm" and find_spec("vllm") is None:
        raise NotPossibleError("vLLM is not installed")
    run = setting.configure(engine=engine)
    prompts = [each.token_ids[~each.loss_mask] for each in setting.sequences()]
    requests = [
        GenerationRequest(SampleId("train", 1, group, member), prompt.tolist(), seed=group)
        for group, prompt in enumerate(prompts)
        for member in range(RESPONSES)
    ]
    params = SamplingParams(max_tokens=setting.size.generated, ignore_eos=True)
    with one_process(setting.device):
        trainer = make_backend(run, "actor", setting.device, trained=False)
        generator = make_engine(run, setting.device)
        versions = count()

        def update() -> None:
            generator.update_weights(trainer.named_weights(), next(versions))

        seconds_update = setting.seconds(update)
        list(generate(generator, requests, params))  # kernels are compiled and chosen
        freed = _free(setting)
        generator.sleep()
        freed = _free(setting) - freed
        update()
        done = []
        seconds = setting.seconds(lambda: done.extend(generate(generator, requests, params)), warm_up=False)
        peak = setting.peak()
        done = done[-len(requests) :]
        sampled = [
            TokenSequence.single_turn(prompts[each.request.id.group], each.token_ids, each.log_probs)
            for each in done
        ]
        differences = apart(setting, trainer, sampled)
    if not differences["rollout/kl"] < HIGHEST_KL:
        raise ValueError(f"engine and trainer are apart: rollout/kl is {differences['rollout/kl']:.3g} nats")
    tokens = sum(len(each.token_ids) for each in done)
    return {
        "generated tokens/s": tokens / seconds,
        "weight update s": seconds_update,
        **differences,
        **({"freed by sleep GiB": freed / GIB} if freed else {}),
        **peak,
    }


def apart(setting: Setting, trainer: TrainingBackend, sampled: list[TokenSequence]) -> Numbers:
    """Compare the engine's log-probs of what it sampled with the trainer's."""
    batches = cut(setting, sampled, packed=True)
    ratios = [
        output.log_probs_T - batch.arrays_T[ROLLOUT_LOG_PROBS]
        for output, batch in zip(trainer.forward(batches), batches, strict=True)
        if output.log_probs_T is not None
    ]
    found = mismatch(torch.cat(ratios))
    return {"rollout/kl": found["kl"].mean().item(), "rollout/ratio/max": found["ratio"].max().item()}


def _free(setting: Setting) -> int:
    """Count the free bytes of the device, whoever holds the others."""
    if setting.device.type != "cuda":
        return 0
    setting.synchronize()
    torch.cuda.empty_cache()
    return torch.cuda.mem_get_info()[0]
