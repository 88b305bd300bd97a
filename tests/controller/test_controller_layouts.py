"""A run goes on from a checkpoint on another number of processes, or in another layout, as if nothing had changed."""

import json
from collections.abc import Callable
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from iiverl_core.checkpoints import STATE_FILE
from iiverl_core.config import Loaded
from iiverl_core.controller import train
from iiverl_core.controller.state import TrainState

pytestmark = [pytest.mark.slow, pytest.mark.alone, pytest.mark.usefixtures("ray_is_up")]

FURTHER = 3
ROWS, BATCH = 20, 4
ACTOR = "actor_rollout_ref.actor"
EVERYTHING = (
    "algorithm.adv_estimator=gae",
    "algorithm.use_kl_in_reward=true",
    "algorithm.kl_ctrl.type=adaptive",
    "algorithm.kl_ctrl.target_kl=0.001",
    "algorithm.kl_ctrl.horizon=50",
    "algorithm.filter_groups.enable=true",
    "algorithm.filter_groups.max_num_gen_batches=4",
    f"data.gen_batch_size={BATCH}",
    "trainer.critic_warmup=4",
    f"{ACTOR}.ppo_mini_batch_size=2",
    f"critic.ppo_mini_batch_size={BATCH}",
    "critic.ppo_max_token_len_per_gpu=4096",
)
"""PPO, whose critic warms up, with an adaptive KL and dynamic sampling; the critic's loss is that of one update."""
SAVING = (
    "trainer.save_freq=1",
    "trainer.max_actor_ckpt_to_keep=100",
    f"{ACTOR}.checkpoint.save_contents=[model,optimizer,extra]",
)


def resume_from(folder: Path, step: int) -> str:
    return f"trainer.resume_mode={folder}/global_step_{step}"


def megatron(tensor: int = 1, pipeline: int = 1) -> tuple[str, ...]:
    return (
        f"{ACTOR}.strategy=megatron",
        f"{ACTOR}.megatron.dtype=fp32",
        f"{ACTOR}.megatron.tensor_model_parallel_size={tensor}",
        f"{ACTOR}.megatron.pipeline_model_parallel_size={pipeline}",
    )


@pytest.fixture
def run(
    quickstart: Callable[..., Loaded], quickstart_inputs: Path, tmp_path: Path
) -> Callable[..., list[dict[str, float]]]:
    """Train in a folder on a number of processes, and return the metrics of each step that do not depend on it."""
    rows = (quickstart_inputs / "train.jsonl").read_text().splitlines(keepends=True)[:ROWS]
    (tmp_path / "train.jsonl").write_text("".join(rows))

    def train_in(folder: str, steps: int, processes: int, *more: str) -> list[dict[str, float]]:
        train(
            quickstart(
                f"data.train_files={tmp_path}/train.jsonl",
                f"critic.model.path={quickstart_inputs}/model",
                f"trainer.total_training_steps={steps}",
                "trainer.total_epochs=100",
                *more,
                runtime="ray" if processes > 1 else "local",
                folder=folder,
            )
        )
        lines = (tmp_path / folder / "metrics.jsonl").read_text().splitlines()
        return [
            {name: value for name, value in json.loads(line).items() if is_shared(name)} for line in lines
        ]

    return train_in


def is_shared(name: str) -> bool:
    return name == "step" or (
        name.startswith(("actor/", "critic/", "response_length/", "rollout/", "reward/"))
        and name != "reward/hidden_fraction"
    )


def responses(folder: Path, step: int) -> list[str]:
    return pq.read_table(folder / "samples" / f"{step}.parquet")["response"].to_pylist()


def compare(found: list[dict[str, float]], whole: list[dict[str, float]]) -> None:
    """Compare the steps of a run that went on with the same ones of another: the first loss, then all metrics."""
    expected = [record for record in whole if record["step"] in {each["step"] for each in found}]
    assert len(found) == len(expected) >= FURTHER
    assert found[0]["critic/vf_loss"] == pytest.approx(expected[0]["critic/vf_loss"], rel=1e-6)
    for one, other in zip(found, expected, strict=True):
        assert one.keys() == other.keys()
        assert one == pytest.approx(other, rel=1e-3, abs=1e-5)


def test_another_number_of_processes_goes_on_where_one_stopped(
    run: Callable[..., list[dict[str, float]]], tmp_path: Path
) -> None:
    """From the first step, in the critic's warm-up, to two processes; back to one after the last batch of an epoch."""
    one = run("one", 8, 1, *SAVING, *EVERYTHING)
    two = run("two", 8, 2, *SAVING, *EVERYTHING, resume_from(tmp_path / "one", 1))
    compare(two, one)
    assert all(responses(tmp_path / "two", step) == responses(tmp_path / "one", step) for step in (2, 8))
    states = [
        TrainState.from_json((tmp_path / "two" / f"global_step_{step}" / STATE_FILE).read_text())
        for step in range(2, 9)
    ]
    assert len({state.kl_coef for state in states}) > 3  # it adapts
    step = next(state.step for state in states if state.batches_consumed % (ROWS // BATCH) == 0)
    assert any(
        state.batches_consumed > state.step for state in states if state.step <= step
    )  # groups were replaced
    compare(run("back", 8, 1, *EVERYTHING, resume_from(tmp_path / "two", step)), two)


def test_processes_that_share_sequences_go_on_where_one_stopped(
    run: Callable[..., list[dict[str, float]]], tmp_path: Path
) -> None:
    """The actor's sequences are split over both processes, which generate different responses; the critic's are not."""
    more = f"{ACTOR}.ulysses_sequence_parallel_size=2", f"{ACTOR}.ppo_max_token_len_per_gpu=64"
    one = run("one", 4, 1, *SAVING, *EVERYTHING)
    compare(run("two", 4, 2, *EVERYTHING, *more, resume_from(tmp_path / "one", 1)), one)


@pytest.mark.megatron
def test_another_layout_of_megatron_goes_on_where_one_stopped(
    run: Callable[..., list[dict[str, float]]], tmp_path: Path
) -> None:
    tensor = run("tensor", 4, 2, *SAVING, *EVERYTHING, *megatron(tensor=2))
    start = resume_from(tmp_path / "tensor", 1)
    compare(run("pipeline", 4, 2, *EVERYTHING, *megatron(pipeline=2), start), tensor)
    compare(run("alone", 4, 1, *EVERYTHING, *megatron(), start), tensor)
