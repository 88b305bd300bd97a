"""A step's gradient is the same for every micro-batch size, layout, order of samples and number of ranks, under every
policy loss and for the critic."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForTokenClassification
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.mistral.modeling_mistral import MistralRMSNorm
from transformers.models.qwen2.modeling_qwen2 import Qwen2RMSNorm

from iiverl_core.algorithms import PolicyBatch, Segments, find_policy_loss
from iiverl_core.algorithms.rollout_correction import RolloutCorrection
from iiverl_core.config import FSDPConfig, ModelConfig, Offload, OptimConfig
from iiverl_core.registry import POLICY_LOSSES
from iiverl_core.samples import TokenSequence
from iiverl_core.training import Loss, MicroBatch, ModelSpec, Role
from iiverl_core.training.aggregation import token_weights
from iiverl_core.training.batching import dummy_micro_batch, make_micro_batch
from iiverl_core.training.losses import actor_loss, critic_loss, policy_loss_settings
from iiverl_core.training.planning import Packing, SequenceSize, balance, micro_batches
from iiverl_fsdp.backend import FSDPBackend
from ranks import Ranks
from rollouts import loss_config, mixed_sequences, trained_positions

CPU = torch.device("cpu")
FP32 = {"param_dtype": "fp32", "reduce_dtype": "fp32"}
FP64 = {
    "param_dtype": "fp64",
    "reduce_dtype": "fp64",
}  # no configuration offers it; it tells rounding from faults
ARRAYS = ("advantages", "old_log_probs", "ref_log_probs")
CORRECTION = RolloutCorrection(importance="token", cap=1.5, rejection="geometric", low=0.9, high=1.3)
SAMPLES = 9  # odd, so that ranks get unequal numbers
GROUP = 3  # samples in a group
EXACT, FP32_INSIDE = 1e-11, 1e-7  # tolerances in fp64: of everything, and where a layer rounds to fp32


def spec(path: str, *, packed: bool = False, offload: bool = False, **parallel) -> ModelSpec:
    return ModelSpec(
        offload=Offload(parameters=offload),
        role="actor",
        model=ModelConfig(path=path, use_remove_padding=packed, enable_gradient_checkpointing=False),
        parallel=FSDPConfig(**{"mixed_precision": FP32, **parallel}),
        device=CPU,
        optim=OptimConfig(lr=1e-2),
        grad_clip=1.0,
    )


def data() -> tuple[list[TokenSequence], dict[str, list[np.ndarray]]]:
    """Sequences of which half have trained tokens anywhere, with arrays that make every part of the loss count."""
    rng = np.random.default_rng(0)
    tokens = mixed_sequences(rng, SAMPLES, 0, 256)
    for i in range(SAMPLES):
        if i % GROUP:  # begins as the first of its group, which may be short
            first, own = tokens[i - i % GROUP].token_ids, tokens[i].token_ids
            alike = min(len(first), len(own)) * 2 // 3
            own[:alike] = first[:alike]
    arrays = {
        "advantages": [rng.normal(size=t.trained).astype(np.float32) for t in tokens],
        "old_log_probs": [rng.normal(-5.8, 0.2, t.trained).astype(np.float32) for t in tokens],
        "ref_log_probs": [rng.normal(-5.8, 0.2, t.trained).astype(np.float32) for t in tokens],
    }
    return tokens, arrays


def prefix(tokens: list[TokenSequence], i: int) -> int:
    """The number of first tokens that the group of a sample has in common."""
    first, *others = tokens[i - i % GROUP :][:GROUP]
    return min(each.prefix_of(first.token_ids.tolist()) for each in others)


def plan(
    packing: Packing, mode: str, order: list[int], more: dict[str, list[np.ndarray]] | None = None
) -> list[MicroBatch]:
    """This rank's micro-batches of the whole batch, its samples taken in `order`; `more` arrays of each sample."""
    tokens, arrays = data()
    arrays |= more or {}
    shares = packing.layout == "shared"
    sizes = [
        SequenceSize(len(tokens[i].token_ids), prefix(tokens, i) if shares else 0, i // GROUP) for i in order
    ]
    weights = token_weights(mode, [tokens[i].trained for i in order], max_tokens_norm=20)
    shares = balance(sizes, dist.get_world_size())
    mine = micro_batches(sizes, shares, packing)[dist.get_rank()]
    share = 1 / sum(t.trained for t in tokens)
    return [
        make_micro_batch(
            [tokens[order[i]] for i in batch],
            {name: [array[order[i]] for i in batch] for name, array in arrays.items()},
            [weights[i] for i in batch],
            inv_num_tokens=share,
            groups=[order[i] // GROUP for i in batch],
            device=CPU,
        )
        if batch
        else dummy_micro_batch(tuple(arrays), CPU)
        for batch in mine
    ]


def gradients(
    path: str, packed: bool, packing: Packing, mode: str, order: list[int]
) -> dict[str, torch.Tensor]:
    backend = FSDPBackend(spec(path, packed=packed))
    loss = loss_config(
        clip_ratio_low=0.2, clip_ratio_high=0.28, use_kl_loss=True, kl_loss_coef=0.1, entropy_coeff=0.05
    )
    metrics = backend.forward_backward(
        plan(packing, mode, order),
        actor_loss(loss, find_policy_loss("vanilla"), RolloutCorrection()),
        entropy=True,
    )
    result = {name: gradient.clone() for name, gradient in backend.named_gradients()}
    total = torch.tensor([metrics[name] for name in sorted(metrics)])
    dist.all_reduce(total)
    return result | {"metrics": total}


IN_ORDER = list(range(SAMPLES))
CASES = {
    "one sequence at a time": (False, Packing(sequences=1), IN_ORDER),
    "packed, one row": (True, Packing(), IN_ORDER),
    "packed, token budget": (True, Packing(tokens=40), IN_ORDER),
    "shared, token budget": (True, Packing(tokens=40, layout="shared"), IN_ORDER),
    "padded, token budget": (False, Packing(tokens=60, layout="padded"), IN_ORDER),
    "another order": (False, Packing(sequences=4), IN_ORDER[::-1]),
}


def all_cases(path: str, mode: str) -> dict[str, dict[str, torch.Tensor]]:
    return {name: gradients(path, *case[:2], mode, case[2]) for name, case in CASES.items()}


def assert_same(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> None:
    assert left.keys() == right.keys()
    for name in left:
        torch.testing.assert_close(
            left[name], right[name], rtol=1e-4, atol=2e-6, msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.mark.parametrize("mode", ["token-mean", "seq-mean-token-mean"])
def test_gradients_do_not_depend_on_batching(one_rank, tiny_model_path: Path, mode: str) -> None:
    reference = gradients(str(tiny_model_path), False, Packing(sequences=8), mode, IN_ORDER)
    assert max(tensor.abs().max() for tensor in reference.values()) > 1e-3
    for name, result in all_cases(str(tiny_model_path), mode).items():
        print(name)
        assert_same(result, reference)


@contextmanager
def norms_in_fp64() -> Iterator[None]:
    """Let norms compute in the dtype of their input, where transformers rounds to fp32, and so do gradients on their way
    back: once for a prompt that is shared, once per response if it is not."""

    def forward(norm: Any, x: torch.Tensor) -> torch.Tensor:
        return norm.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + norm.variance_epsilon))

    with ExitStack() as patches:
        for norm in (Qwen2RMSNorm, LlamaRMSNorm, MistralRMSNorm):
            patches.enter_context(mock.patch.object(norm, "forward", forward))
        yield


def in_fp64(path: str, packed: bool, role: Role, **more: Any) -> FSDPBackend:
    base = spec(path, packed=packed)
    unfused = {"override_config": {"experts_implementation": "eager"}}  # the fused one refuses fp64
    precision = base.parallel.mixed_precision.model_copy(update=FP64)
    parallel = base.parallel.model_copy(update={"mixed_precision": precision, "model_dtype": "fp64"})
    return FSDPBackend(
        ModelSpec(
            **{
                **vars(base),
                "model": base.model.model_copy(update=unfused),
                "parallel": parallel,
                "role": role,
                **more,
            }
        )
    )


def gradient_of(backend: FSDPBackend, batches: list[MicroBatch], loss: Loss) -> torch.Tensor:
    """The gradient of all parameters, one after the other, in one vector."""
    backend.forward_backward(batches, loss, entropy=True)
    return torch.cat([gradient.flatten() for _, gradient in backend.named_gradients()])


def of_the_critic(path: str, packed: bool, packing: Packing, order: list[int]) -> torch.Tensor:
    """The gradient of the critic's loss; about half of the values are clipped."""
    rng = np.random.default_rng(2)
    more = {name: [rng.normal(0, 3, t.trained) for t in data()[0]] for name in ("values", "returns")}
    batches = plan(packing, "token-mean", order, more)
    return gradient_of(
        in_fp64(path, packed, "critic"), batches, critic_loss(loss_config(cliprange_value=0.5))
    )


@norms_in_fp64()
def every_loss(
    path: str, critic_path: str, packed: bool, packing: Packing, order: list[int]
) -> dict[str, torch.Tensor]:
    """The gradient of every policy loss with weights against a mismatch, and of the critic's loss, in fp64."""
    backend = in_fp64(path, packed, "actor")
    tokens, arrays = data()
    rng = np.random.default_rng(1)
    current = known_log_probs(path)
    near = [x + rng.normal(0, 0.3, len(x)) for x in current]
    more = {
        "advantages": [a.astype(np.float64) for a in arrays["advantages"]],
        "old_log_probs": near,
        "rollout_log_probs": [x + rng.normal(0, 0.1, len(x)) for x in near],
    }
    results = {"critic": of_the_critic(critic_path, packed, packing, order)}
    for name, policy_loss in ((name, find_policy_loss(name)) for name in POLICY_LOSSES):
        loss = loss_config(
            clip_ratio_low=0.2,
            clip_ratio_high=0.28,
            policy_loss={"clip_cov_ratio": 0.1, "clip_cov_lb": 0.05, "kl_cov_ratio": 0.1},
        )
        if policy_loss.select_tokens is not None:
            whole = [
                torch.from_numpy(np.concatenate([rows[i] for i in order]))
                for rows in (current, more["old_log_probs"], more["advantages"])
            ]
            segments = Segments.of([tokens[i].trained for i in order])
            token_mask_T = policy_loss.select_tokens(
                PolicyBatch(*whole, segments), policy_loss_settings(loss)
            )
            assert 0 < token_mask_T.sum() < len(token_mask_T)
            parts = dict(zip(order, segments.split(token_mask_T), strict=True))
            more["token_mask"] = [parts[i].numpy() for i in range(SAMPLES)]
        mode = policy_loss.loss_agg_mode or "token-mean"
        batches = plan(packing, mode, order, more)
        results[name] = gradient_of(backend, batches, actor_loss(loss, policy_loss, CORRECTION))
    return results


def known_log_probs(path: str) -> list[np.ndarray]:
    """The log-probs of each response, fp64, by transformers alone."""
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float64)
    result = []
    for t in data()[0]:
        ids, predicting, targets = trained_positions(t)
        with torch.no_grad():
            log_softmax = model(ids).logits[0, predicting].log_softmax(-1)
        result.append(log_softmax.gather(1, targets[:, None])[:, 0].numpy())
    return result


@pytest.fixture(scope="module")
def tiny_critic_path(tiny_model_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a critic whose head is not zero, so that its gradient reaches every weight."""
    model = AutoModelForTokenClassification.from_pretrained(tiny_model_path, num_labels=1)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        torch.nn.init.normal_(model.score.weight)
    path = tmp_path_factory.mktemp("tiny-critic")
    model.save_pretrained(path)
    return path


def assert_same_losses(result: dict[str, torch.Tensor], reference: dict[str, torch.Tensor]) -> None:
    assert result.keys() == POLICY_LOSSES.keys() | {"critic"}
    for name, gradient in reference.items():
        assert gradient.dtype == torch.float64 and gradient.abs().max() > 1e-4, name
        torch.testing.assert_close(
            result[name], gradient, rtol=1e-5, atol=1e-10, msg=lambda m, n=name: f"{n}: {m}"
        )


def test_the_gradient_of_every_loss_does_not_depend_on_batching(
    one_rank, tiny_model_path: Path, tiny_critic_path: Path
) -> None:
    paths = str(tiny_model_path), str(tiny_critic_path)
    reference = every_loss(*paths, False, Packing(sequences=SAMPLES), IN_ORDER)
    for packed, packing, order in (
        (True, Packing(tokens=40), IN_ORDER),
        (False, Packing(sequences=4), IN_ORDER[::-1]),
    ):
        assert_same_losses(every_loss(*paths, packed, packing, order), reference)


ARCHITECTURES: dict[str, tuple[str, float, dict[str, Any]]] = {
    "a head of keys per head of queries": ("llama", EXACT, {"num_key_value_heads": 4}),
    "sliding window": ("mistral", EXACT, {"sliding_window": 5}),
    "sliding window in some layers": (
        "gemma3_text",
        FP32_INSIDE,
        {"sliding_window": 5, "layer_types": ["sliding_attention", "full_attention"]},
    ),
    "mixture of experts": (
        "qwen3_moe",
        FP32_INSIDE,
        {
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 16,
        },
    ),
}


@pytest.fixture(scope="module")
def architecture_paths(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """A folder with a tiny random model per kind of attention."""
    paths = {}
    for i, (name, (architecture, _, options)) in enumerate(ARCHITECTURES.items()):
        sizes = {
            "vocab_size": 256,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 8,
            "max_position_embeddings": 64,
            "pad_token_id": 0,
            "dtype": "float32",
        }
        config = AutoConfig.for_model(architecture, **(sizes | options))
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(i)
            model = AutoModelForCausalLM.from_config(config)
            for parameter in model.parameters():
                if parameter.dim() > 1:  # attention that is far from even, so that its neighbours count
                    torch.nn.init.normal_(parameter, std=0.2)
        paths[name] = str(tmp_path_factory.mktemp("architecture"))
        model.save_pretrained(paths[name])
    return paths


@norms_in_fp64()
def outputs_and_gradient(path: str, packed: bool, role: Role, packing: Packing) -> dict[str, torch.Tensor]:
    """In fp64: this rank's outputs for every micro-batch by sequence and token, and the whole gradient."""
    backend = in_fp64(path, packed, role)
    assert backend.layout == ("shared" if packed else "padded")
    zeros = [np.zeros(t.trained) for t in data()[0]]
    batches = plan(packing, "token-mean", IN_ORDER, {"values": zeros, "returns": [x - 1 for x in zeros]})
    found = {}
    for batch, outputs in zip(batches, backend.forward(batches, entropy=True), strict=True):
        for name in ("log_probs_T", "entropy_T", "values_T"):
            x_T = getattr(outputs, name)
            if x_T is not None:
                parts = zip(batch.sequences, batch.segments.split(x_T), strict=True)
                found |= {f"{name} {sequence.token_ids.tobytes()}": part for sequence, part in parts}
    config = loss_config(use_kl_loss=True, kl_loss_coef=0.1, entropy_coeff=0.05)
    loss = (
        critic_loss(config)
        if role == "critic"
        else actor_loss(config, find_policy_loss("vanilla"), RolloutCorrection())
    )
    return found | {"gradient": gradient_of(backend, batches, loss)}


@pytest.mark.parametrize("role", ["actor", "critic"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_packing_changes_nothing_for_any_attention(
    one_rank, architecture_paths: dict[str, str], architecture: str, role: Role
) -> None:
    path, tolerance = architecture_paths[architecture], ARCHITECTURES[architecture][1]
    expected = outputs_and_gradient(path, False, role, Packing(sequences=1))
    assert expected["gradient"].abs().max() > 1e-4
    for packing in (Packing(), Packing(tokens=40)):
        found = outputs_and_gradient(path, True, role, packing)
        assert found.keys() == expected.keys()
        for name, tensor in expected.items():
            torch.testing.assert_close(found[name], tensor, rtol=1e3 * tolerance, atol=tolerance)


@pytest.mark.slow
def test_the_gradient_of_every_loss_does_not_depend_on_the_number_of_ranks(
    one_rank, ranks: Callable[..., Ranks], tiny_model_path: Path, tiny_critic_path: Path
) -> None:
    paths = str(tiny_model_path), str(tiny_critic_path)
    reference = every_loss(*paths, False, Packing(sequences=SAMPLES), IN_ORDER)
    for result in ranks(2).run(every_loss, *paths, False, Packing(sequences=1), IN_ORDER):
        assert_same_losses(result, reference)


@pytest.mark.slow
def test_gradients_do_not_depend_on_the_number_of_ranks(
    one_rank, ranks: Callable[..., Ranks], tiny_model_path: Path
) -> None:
    reference = gradients(str(tiny_model_path), False, Packing(sequences=8), "token-mean", IN_ORDER)
    for results in ranks(2).run(all_cases, str(tiny_model_path), "token-mean"):
        for result in results.values():
            assert_same(result, reference)


@pytest.mark.parametrize("packed", [False, True])
def test_the_gradient_is_that_of_the_whole_batch_by_hand(
    one_rank, tiny_model_path: Path, packed: bool
) -> None:
    """The clipped loss of the trained tokens with entropy and KL, written out on an unsharded model, sequence by sequence."""
    model = AutoModelForCausalLM.from_pretrained(tiny_model_path, dtype=torch.float32)
    tokens, arrays = data()
    total = torch.zeros(())
    count = sum(t.trained for t in tokens)
    for i, t in enumerate(tokens):
        ids, predicting, targets = trained_positions(t)
        log_softmax = model(ids).logits[0, predicting].log_softmax(-1)
        log_probs = log_softmax.gather(1, targets[:, None])[:, 0]
        old, ref, advantage = (
            torch.from_numpy(arrays[name][i]) for name in ("old_log_probs", "ref_log_probs", "advantages")
        )
        ratio = (log_probs - old).exp()
        loss = torch.maximum(-advantage * ratio, -advantage * ratio.clamp(0.8, 1.28))
        loss = torch.where(advantage < 0, torch.minimum(loss, -3 * advantage), loss)
        entropy = -(log_softmax.exp() * log_softmax).sum(-1)
        kl = (ref - log_probs).exp() - (ref - log_probs) - 1
        total = total + (loss - 0.05 * entropy + 0.1 * kl).sum() / count
    total.backward()
    expected = {name: parameter.grad for name, parameter in model.named_parameters()}
    result = gradients(str(tiny_model_path), packed, Packing(sequences=4), "token-mean", IN_ORDER)
    result.pop("metrics")
    assert_same(result, expected)


@pytest.mark.parametrize("packed", [False, True])
def test_step_clips_and_moves_every_weight(one_rank, tiny_model_path: Path, packed: bool) -> None:
    backend = FSDPBackend(spec(str(tiny_model_path), packed=packed))
    before = {name: tensor.clone() for name, tensor in backend.named_weights()}
    loss = loss_config(clip_ratio_low=0.2, clip_ratio_high=0.2)
    backend.forward_backward(
        plan(Packing(sequences=4), "token-sum", IN_ORDER),
        actor_loss(loss, find_policy_loss("vanilla"), RolloutCorrection()),
        entropy=True,
    )
    result = backend.step(lr=1e-2)
    assert result.taken and result.grad_norm > 0
    after = dict(backend.named_weights())
    assert all(not torch.equal(after[name], before[name]) for name in before)
    assert not any(gradient.any() for _, gradient in backend.named_gradients())


def test_a_gradient_that_is_not_finite_is_not_followed(one_rank, tiny_model_path: Path) -> None:
    backend = FSDPBackend(spec(str(tiny_model_path)))
    before = {name: tensor.clone() for name, tensor in backend.named_weights()}

    def broken(outputs, batch):
        return outputs.log_probs_T.sum() * float("nan"), {}

    backend.forward_backward(plan(Packing(sequences=4), "token-mean", IN_ORDER), broken)
    assert not backend.step(lr=1e-2).taken
    assert all(torch.equal(tensor, before[name]) for name, tensor in backend.named_weights())


def converted_weights(path: str) -> list[tuple[str, torch.Tensor]]:
    backend = FSDPBackend(spec(path))
    sizes: list[int] = []
    gather = DTensor.full_tensor

    def recorded(value: DTensor, **options) -> torch.Tensor:
        sizes.append(value.dtype.itemsize)
        return gather(value, **options)

    with mock.patch.object(DTensor, "full_tensor", recorded):
        weights = list(backend.named_weights(torch.bfloat16))
    assert sizes == [torch.bfloat16.itemsize] * len(weights)
    return weights


def test_weights_are_converted_before_they_are_gathered(one_rank, tiny_model_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_model_path, dtype=torch.bfloat16)
    weights = dict(converted_weights(str(tiny_model_path)))
    assert weights.keys() == dict(model.named_parameters()).keys()
    assert all(torch.equal(weights[name], p) for name, p in model.named_parameters())


def test_weights_are_those_on_disk(one_rank, tiny_model_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_model_path, dtype=torch.float32)
    backend = FSDPBackend(spec(str(tiny_model_path)))
    weights = dict(backend.named_weights())
    assert weights.keys() == dict(model.named_parameters()).keys()
    assert all(torch.equal(weights[name], p) for name, p in model.named_parameters())
    assert backend.parameter_count() == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("options", [{"offload": True}, {"mixed_precision": {"param_dtype": "bf16"}}])
def test_offload_and_mixed_precision_give_about_the_same(
    one_rank, tiny_model_path: Path, options: dict
) -> None:
    batches = plan(Packing(sequences=4), "token-mean", IN_ORDER)
    expected = FSDPBackend(spec(str(tiny_model_path))).forward(batches, entropy=True)
    results = FSDPBackend(spec(str(tiny_model_path), **options)).forward(batches, entropy=True)
    for result, reference in zip(results, expected, strict=True):
        torch.testing.assert_close(result.log_probs_T, reference.log_probs_T, atol=0.03, rtol=0)
        assert result.log_probs_T.dtype == torch.float32


@pytest.mark.parametrize("reshard", [True, False])
@pytest.mark.parametrize("packed", [False, True])
def test_no_weight_is_left_gathered(one_rank, tiny_model_path: Path, packed: bool, reshard: bool) -> None:
    """Neither by the checks when a model is built nor by a forward pass, which no backward pass follows."""
    backend = FSDPBackend(spec(str(tiny_model_path), packed=packed, reshard_after_forward=reshard))
    for _ in range(2):
        assert all(isinstance(each, DTensor) for each in backend._model.parameters())
        backend.forward(plan(Packing(sequences=4), "token-mean", IN_ORDER))


def test_gradient_checkpointing_and_resharding_change_nothing(one_rank, tiny_model_path: Path) -> None:
    def gradient(checkpointing: bool, **fsdp: bool) -> dict[str, torch.Tensor]:
        base = spec(str(tiny_model_path), **fsdp)
        model = base.model.model_copy(update={"enable_gradient_checkpointing": checkpointing})
        backend = FSDPBackend(ModelSpec(**{**vars(base), "model": model}))
        loss = loss_config(clip_ratio_low=0.2, clip_ratio_high=0.2)
        backend.forward_backward(
            plan(Packing(sequences=4), "token-mean", IN_ORDER),
            actor_loss(loss, find_policy_loss("vanilla"), RolloutCorrection()),
            entropy=True,
        )
        return {name: gradient.clone() for name, gradient in backend.named_gradients()}

    assert_same(gradient(True), gradient(False))
    assert_same(gradient(True), gradient(True, reshard_after_forward=False))
