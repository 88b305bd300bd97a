"""Critic and reward model against transformers by hand, whatever they start from and however the work is divided."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
)

from iiverl_core.algorithms.value_loss import value_loss
from iiverl_core.config import FSDPConfig, ModelConfig, Offload, OptimConfig
from iiverl_core.errors import ConfigError
from iiverl_core.samples import TokenSequence
from iiverl_core.training import MicroBatch, ModelSpec, Outputs, Role
from iiverl_core.training.aggregation import token_weights
from iiverl_core.training.batching import dummy_micro_batch, make_micro_batch
from iiverl_core.training.planning import Packing, SequenceSize, balance, micro_batches
from iiverl_fsdp.backend import FSDPBackend
from ranks import Ranks
from rollouts import mixed_sequences, trained_positions

CPU = torch.device("cpu")
FP32 = {"param_dtype": "fp32", "reduce_dtype": "fp32"}
ARRAYS = ("values", "returns")
SAMPLES = 9  # odd, so that ranks get unequal numbers
IN_ORDER = list(range(SAMPLES))
SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
AUTO = {
    "plain": AutoModelForCausalLM,
    "scores": AutoModelForSequenceClassification,
    "tokens": AutoModelForTokenClassification,
}


def make(folder: Path, kind: str, architecture: str, labels: int = 1) -> Path:
    """Save a tiny random model whose head, if it is one that gives numbers, gives large ones."""
    path = folder / f"{architecture}-{kind}-{labels}"
    config = AutoConfig.for_model(architecture, **SIZES)
    if kind != "plain":
        config.num_labels = labels
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AUTO[kind].from_config(config)
        for name, parameter in model.named_parameters():
            if name.startswith(("score", "classifier")):
                torch.nn.init.normal_(parameter)
    model.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("value-models")


@pytest.fixture(scope="module")
def critic_path(folder: Path) -> Path:
    return make(folder, "tokens", "qwen2")


def backend(
    role: Role,
    path: Path,
    *,
    packed: bool | None = False,
    checkpointing: bool = False,
    offload: bool = False,
    **parallel,
) -> FSDPBackend:
    return FSDPBackend(
        ModelSpec(
            role=role,
            model=ModelConfig(
                path=str(path), use_remove_padding=packed, enable_gradient_checkpointing=checkpointing
            ),
            parallel=FSDPConfig(**{"mixed_precision": FP32, **parallel}),
            offload=Offload(parameters=offload),
            device=CPU,
            optim=OptimConfig(lr=1e-2, weight_decay=0.0) if role == "critic" else None,
            grad_clip=1.0,
        )
    )


def data() -> tuple[list[TokenSequence], dict[str, list[np.ndarray]]]:
    """Sequences of which half have trained tokens anywhere, and targets at which values are clipped."""
    rng = np.random.default_rng(0)
    tokens = mixed_sequences(rng, SAMPLES, 3, 64)
    arrays = {name: [rng.normal(0, 3, t.trained).astype(np.float32) for t in tokens] for name in ARRAYS}
    return tokens, arrays


def plan(packing: Packing, order: list[int] = IN_ORDER) -> tuple[list[list[int]], list[MicroBatch]]:
    """This rank's micro-batches of the whole batch, and the samples in each."""
    tokens, arrays = data()
    sizes = [SequenceSize(len(tokens[i].token_ids)) for i in order]
    weights = token_weights("token-mean", [tokens[i].trained for i in order], max_tokens_norm=20)
    shares = balance(sizes, dist.get_world_size())
    mine = micro_batches(sizes, shares, packing)[dist.get_rank()]
    batches = [
        make_micro_batch(
            [tokens[order[i]] for i in batch],
            {name: [arrays[name][order[i]] for i in batch] for name in ARRAYS},
            [weights[i] for i in batch],
            device=CPU,
        )
        if batch
        else dummy_micro_batch(ARRAYS, CPU)
        for batch in mine
    ]
    return [[order[i] for i in batch] for batch in mine], batches


def loss(outputs: Outputs, batch: MicroBatch) -> tuple[Tensor, dict[str, Tensor]]:
    assert outputs.values_T is not None
    loss_T, _ = value_loss(outputs.values_T, batch.arrays_T["values"], batch.arrays_T["returns"], 0.5)
    value = batch.weights_T.float() @ loss_T
    return value, {"critic/vf_loss": value.detach()}


CASES = {
    "one sequence at a time": (False, Packing(sequences=1), IN_ORDER),
    "padded, three sequences": (False, Packing(sequences=3), IN_ORDER),
    "padded, token budget": (False, Packing(tokens=60, layout="padded"), IN_ORDER),
    "packed, one row": (True, Packing(), IN_ORDER),
    "packed, token budget": (True, Packing(tokens=40), IN_ORDER),
    "another order": (False, Packing(sequences=4), IN_ORDER[::-1]),
}


def values(path: Path, case: str, **options) -> dict[int, Tensor]:
    """The critic's values of each sample that this rank worked on."""
    packed, packing, order = CASES[case]
    samples, batches = plan(packing, order)
    found: dict[int, Tensor] = {}
    for numbers, batch, output in zip(
        samples, batches, backend("critic", path, packed=packed, **options).forward(batches), strict=True
    ):
        assert output.values_T is not None and output.log_probs_T is None and output.scores_B is None
        if numbers:
            found |= dict(zip(numbers, batch.segments.split(output.values_T), strict=True))
    return found


def scores(path: Path, case: str) -> dict[int, Tensor]:
    """The reward model's score of each sample that this rank worked on."""
    packed, packing, order = CASES[case]
    samples, batches = plan(packing, order)
    found: dict[int, Tensor] = {}
    for numbers, output in zip(samples, backend("reward", path, packed=packed).forward(batches), strict=True):
        assert output.scores_B is not None and output.scores_B.dtype == torch.float32
        found |= dict(zip(numbers, output.scores_B, strict=False))  # a dummy has no number
    return found


def gradients(path: Path, case: str, **options) -> dict[str, Tensor]:
    packed, packing, order = CASES[case]
    model = backend("critic", path, packed=packed, **options)
    metrics = model.forward_backward(plan(packing, order)[1], loss)
    total = torch.tensor(metrics["critic/vf_loss"])
    dist.all_reduce(total)
    return dict(model.named_gradients()) | {"loss": total}


def ids_of(sequence: TokenSequence) -> Tensor:
    return torch.from_numpy(sequence.token_ids)[None]


def predicting(sequence: TokenSequence) -> Tensor:
    return trained_positions(sequence)[1]


def values_by_hand(model: torch.nn.Module) -> list[Tensor]:
    """Values of each sample: token classification at the position before each trained token."""
    model.eval()
    return [model(ids_of(t)).logits[0, predicting(t), 0] for t in data()[0]]


def same(left: Tensor, right: Tensor, name: object) -> None:
    torch.testing.assert_close(left, right, rtol=1e-4, atol=1e-5, msg=lambda m: f"{name}: {m}")


@pytest.mark.parametrize("case", CASES)
def test_values_are_those_of_transformers(one_rank, critic_path: Path, case: str) -> None:
    found = values(critic_path, case)
    expected = values_by_hand(AutoModelForTokenClassification.from_pretrained(critic_path))
    assert sorted(found) == IN_ORDER and max(v.abs().max() for v in expected) > 1
    for i, value in enumerate(expected):
        same(found[i], value, i)


@pytest.mark.parametrize("case", CASES)
def test_gradients_are_those_by_hand_for_every_division(one_rank, critic_path: Path, case: str) -> None:
    """The clipped loss, written out on an unsharded model, sequence by sequence."""
    model = AutoModelForTokenClassification.from_pretrained(critic_path)
    tokens, arrays = data()
    total, clipped = torch.zeros(()), 0
    for value, old, target in zip(values_by_hand(model), arrays["values"], arrays["returns"], strict=True):
        old, target = torch.from_numpy(old), torch.from_numpy(target)
        free, bound = (value - target) ** 2, (torch.clamp(value, old - 0.5, old + 0.5) - target) ** 2
        total = total + torch.maximum(free, bound).sum() / 2 / sum(t.trained for t in tokens)
        clipped += int((bound > free).sum())
    assert clipped > 10
    total.backward()
    found = gradients(critic_path, case)
    same(found.pop("loss"), total.detach(), "loss")
    assert found.keys() == dict(model.named_parameters()).keys()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().max() > 1e-4
        same(found[name], parameter.grad, name)


def test_checkpointing_and_offload_change_no_gradient(one_rank, critic_path: Path) -> None:
    expected = gradients(critic_path, "padded, three sequences")
    for options in ({"checkpointing": True}, {"offload": True}):
        found = gradients(critic_path, "padded, three sequences", **options)
        for name, gradient in expected.items():
            same(found[name], gradient, name)


def test_half_precision_ends_at_the_head(one_rank, critic_path: Path) -> None:
    """A backbone in bf16 gives about the same values, in fp32 and not rounded to bf16."""
    found = values(critic_path, "packed, one row", mixed_precision={"param_dtype": "bf16"})
    exact = values(critic_path, "packed, one row")
    together = torch.cat(list(found.values()))
    assert together.dtype == torch.float32
    assert not torch.equal(together, together.bfloat16().float())
    torch.testing.assert_close(together, torch.cat(list(exact.values())), atol=0.2, rtol=0)


@pytest.mark.parametrize("packed", [False, True])
def test_the_head_sees_only_what_is_asked_for(
    one_rank, critic_path: Path, folder: Path, packed: bool
) -> None:
    _, (batch,) = plan(Packing(sequences=SAMPLES))
    for role, path, count in (
        ("critic", critic_path, sum(s.trained for s in batch.sequences)),
        ("reward", make(folder, "scores", "qwen2"), SAMPLES),
    ):
        model, seen = backend(role, path, packed=packed), []
        model._model.head_module.register_forward_hook(
            lambda _, inputs, __, s=seen: s.append(inputs[0].shape)
        )
        model.forward([batch])
        assert seen == [(count, SIZES["hidden_size"])]


@pytest.mark.parametrize("architecture", ["qwen2", "llama", "gpt2", "olmo", "opt"])
def test_scores_are_those_of_transformers(one_rank, folder: Path, architecture: str) -> None:
    path = make(folder, "scores", architecture)
    model = AutoModelForSequenceClassification.from_pretrained(path).eval()
    with torch.no_grad():
        expected = [model(ids_of(t)).logits[0, 0] for t in data()[0]]
    assert torch.stack(expected).std() > 0.5
    for case in CASES:
        found = scores(path, case)
        assert sorted(found) == IN_ORDER
        for i, score in enumerate(expected):
            same(found[i], score, (case, i))


@pytest.mark.parametrize("role", ["actor", "critic", "reward"])
def test_a_model_whose_attention_cannot_be_packed_is_padded_or_refused(
    one_rank, folder: Path, caplog: pytest.LogCaptureFixture, role: Role
) -> None:
    path = make(folder, "plain" if role == "actor" else "scores", "gemma2")
    assert backend(role, path, packed=False).layout == "padded"
    assert backend(role, path, packed=None).layout == "padded"
    (message,) = [record.getMessage() for record in caplog.records if record.name == "iiverl_fsdp.packing"]
    assert "caps its attention scores" in message and "padded" in message and str(path) in message
    with pytest.raises(ConfigError, match=r"caps its attention scores .* use_remove_padding to false"):
        backend(role, path, packed=True)


def test_attention_that_depends_on_more_than_segments_is_found(one_rank, folder: Path) -> None:
    with pytest.raises(ConfigError, match="layers with chunked_attention"):
        backend("actor", make(folder, "plain", "llama4_text"), packed=True)


def test_dropout_is_off_whatever_its_name(one_rank, folder: Path) -> None:
    """OPT's is `dropout`, 0.1, and works as a function that looks at nothing but whether the model is in training."""
    path = make(folder, "scores", "opt")
    model = AutoModelForSequenceClassification.from_pretrained(path).eval()
    assert model.config.dropout == 0.1
    for i, score in scores(path, "padded, three sequences").items():
        with torch.no_grad():
            same(score, model(ids_of(data()[0][i])).logits[0, 0], i)


def divided(critic_path: Path, reward_path: Path) -> dict[str, tuple[dict, dict, dict]]:
    cases = ("one sequence at a time", "packed, token budget", "another order")
    return {
        case: (gradients(critic_path, case), values(critic_path, case), scores(reward_path, case))
        for case in cases
    }


def stepped(path: Path) -> dict[str, Tensor]:
    model = backend("critic", path)
    for _ in range(3):
        model.forward_backward(plan(Packing(sequences=2))[1], loss)
        assert model.step(lr=1e-3).taken
    return {name: tensor.clone() for name, tensor in model.named_weights()}


def on_each_rank(critic_path: Path, reward_path: Path) -> tuple[dict, dict]:
    return divided(critic_path, reward_path), stepped(critic_path)


@pytest.mark.slow
def test_the_number_of_ranks_changes_nothing(
    one_rank, ranks: Callable[..., Ranks], critic_path: Path, folder: Path
) -> None:
    reward_path = make(folder, "scores", "llama")
    cases, weights = on_each_rank(critic_path, reward_path)
    gradient, value, score = cases["one sequence at a time"]
    on_two = ranks(2).run(on_each_rank, critic_path, reward_path)
    for case in cases:
        results = [found[case] for found, _ in on_two]
        for name, expected in gradient.items():
            for found, _, _ in results:
                same(found[name], expected, (case, name))
        for part, expected in ((1, value), (2, score)):
            together = {**results[0][part], **results[1][part]}
            assert sorted(together) == IN_ORDER
            for i in IN_ORDER:
                same(together[i], expected[i], (case, i))
    for _, found in on_two:
        assert found.keys() == weights.keys()
        for name, weight in weights.items():
            torch.testing.assert_close(found[name], weight, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("architecture", ["qwen2", "gpt2", "olmo", "cohere"])
def test_a_new_head_starts_at_zero_and_learns(one_rank, folder: Path, architecture: str) -> None:
    model = backend("critic", make(folder, "plain", architecture))
    batches = plan(Packing(sequences=4))[1]
    assert all(not output.values_T.any() for output in model.forward(batches))
    before = {name: tensor.clone() for name, tensor in model.named_weights()}
    for _ in range(2):  # in the first step no gradient passes through the head's zeros
        model.forward_backward(batches, loss)
        assert model.step(lr=1e-2).taken
    after = dict(model.named_weights())
    assert all(not torch.equal(after[name], tensor) for name, tensor in before.items())


def test_one_step_moves_every_weight(one_rank, critic_path: Path) -> None:
    model = backend("critic", critic_path)
    before = {name: tensor.clone() for name, tensor in model.named_weights()}
    model.forward_backward(plan(Packing(sequences=4))[1], loss)
    result = model.step(lr=1e-2)
    assert result.taken and result.grad_norm > 0
    assert all(not torch.equal(tensor, before[name]) for name, tensor in model.named_weights())
    assert model.parameter_count() == sum(tensor.numel() for tensor in before.values())


@pytest.mark.parametrize("architecture", ["qwen2", "gpt2", "olmo"])
def test_a_reward_model_becomes_a_critic(one_rank, folder: Path, architecture: str) -> None:
    """Its values are what its head says at each position; token classification has a bias, which is new and zero."""
    path = make(folder, "scores", architecture)
    whole = AutoModelForSequenceClassification.from_pretrained(path).eval()
    found = values(path, "packed, token budget")
    with torch.no_grad():
        for i, t in enumerate(data()[0]):
            expected = whole.score(whole.base_model(ids_of(t)).last_hidden_state)
            same(found[i], expected[0, predicting(t), 0], i)


@pytest.mark.parametrize("architecture", ["qwen2", "gpt2", "olmo", "cohere"])
def test_a_saved_critic_is_read_back(one_rank, folder: Path, tmp_path: Path, architecture: str) -> None:
    model = backend("critic", make(folder, "plain", architecture))
    batches = plan(Packing(sequences=4))[1]
    for _ in range(3):
        model.forward_backward(batches, loss)
        model.step(lr=1e-2)
    weights = {name: tensor.contiguous().clone() for name, tensor in model.named_weights()}
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    model._model.config.save_pretrained(tmp_path)

    expected = torch.cat([output.values_T for output in model.forward(batches)])
    again = backend("critic", tmp_path)
    assert all(torch.equal(tensor, weights[name]) for name, tensor in again.named_weights())
    assert torch.equal(torch.cat([output.values_T for output in again.forward(batches)]), expected)

    found = values(tmp_path, "packed, one row")
    if architecture in ("qwen2", "gpt2"):
        read, info = AutoModelForTokenClassification.from_pretrained(tmp_path, output_loading_info=True)
        assert not info["missing_keys"] and not info["unexpected_keys"]
        by_hand = values_by_hand(read)
    else:  # transformers has no token classification for it: backbone and head, each on its own
        backbone = AutoModel.from_pretrained(tmp_path).eval()
        head = load_file(tmp_path / "model.safetensors")
        by_hand = []
        for t in data()[0]:
            hidden = backbone(ids_of(t)).last_hidden_state[0, predicting(t)]
            by_hand.append(hidden @ head["score.weight"][0] + head["score.bias"])
    assert max(value.abs().max() for value in by_hand) > 0.1
    for i, value in enumerate(by_hand):
        same(found[i], value.detach(), i)


@pytest.mark.parametrize(
    ("role", "kind", "architecture", "labels", "message"),
    [
        ("critic", "scores", "qwen2", 3, r"head of shape \(3, 32\), that is num_labels 3"),
        ("critic", "tokens", "gpt2", 2, r"head of shape \(2, 32\), that is num_labels 2"),
        ("reward", "scores", "llama", 3, r"head of shape \(3, 32\), that is num_labels 3"),
        ("reward", "plain", "qwen2", 1, "is no reward model: its checkpoint has no score head"),
        ("reward", "plain", "cohere", 1, "no sequence classification for its architecture"),
        ("critic", "plain", "bloom", 1, "no critic model can be built from .* does not support an attention"),
        ("reward", "scores", "bert", 1, "does more than apply one linear layer"),
    ],
)
def test_a_head_of_another_kind_is_refused(
    one_rank, folder: Path, role: Role, kind: str, architecture: str, labels: int, message: str
) -> None:
    path = make(folder, kind, architecture, labels)
    with pytest.raises(ConfigError, match=message) as error:
        backend(role, path)
    assert str(path) in str(error.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: w.pop("model.norm.weight"), "lacks 1 weights, among them model.norm.weight"),
        (lambda w: w.update({"v_head.summary.weight": torch.ones(1, 32)}), "does not read: v_head.summary"),
        (lambda w: w.update({"model.norm.weight": torch.ones(7)}), r"has shape \(7,\) where .* \(32,\)"),
    ],
)
@pytest.mark.parametrize("role", ["critic", "reward"])
def test_a_checkpoint_that_does_not_fit_is_refused(
    one_rank, folder: Path, tmp_path: Path, role: Role, change, message: str
) -> None:
    path = make(folder, "scores", "qwen2")
    weights = load_file(path / "model.safetensors")
    change(weights)
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    AutoConfig.from_pretrained(path).save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=message):
        backend(role, tmp_path)


@pytest.mark.parametrize("role", ["critic", "reward"])
def test_no_model_at_all(one_rank, tmp_path: Path, role: Role) -> None:
    with pytest.raises(ConfigError, match="no model can be read from"):
        backend(role, tmp_path / "nothing")
    AutoConfig.for_model("qwen2", **SIZES).save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="no weights can be read from"):
        backend(role, tmp_path)
