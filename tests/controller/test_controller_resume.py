"""A run that was killed and resumed ends with the same bits as one that was not."""

import errno
import json
import os
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint.filesystem import _FileSystemWriter
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

from iiverl_cli.main import app
from iiverl_core.checkpoints import checkpoints, latest
from iiverl_core.cluster.model_runner import ModelRunner
from iiverl_core.config import Loaded
from iiverl_core.controller import train
from iiverl_core.controller.collector import RolloutCollector
from iiverl_core.controller.observer import StepRecord
from iiverl_core.controller.state import TrainState
from iiverl_core.controller.trainer import Trainer
from iiverl_core.errors import CheckpointError, NonFiniteError
from iiverl_core.memory import checkpoint_size, find_facts
from iiverl_core.stopping import Stop
from iiverl_core.training.saved_tensors import SavedTensors

STEPS = 6
SAVING = (f"trainer.total_training_steps={STEPS}", "trainer.save_freq=2", "trainer.resume_mode=auto")
PPO = (
    "algorithm.adv_estimator=gae",
    "critic.ppo_mini_batch_size=4",
    "critic.ppo_max_token_len_per_gpu=4096",
    "algorithm.use_kl_in_reward=true",
    "algorithm.kl_ctrl.type=adaptive",
    "algorithm.kl_ctrl.target_kl=0.001",
    "algorithm.kl_ctrl.horizon=50",
    "trainer.critic_warmup=4",
)
FILTERED = (
    "algorithm.filter_groups.enable=true",
    "algorithm.filter_groups.max_num_gen_batches=3",
    "data.gen_batch_size=4",
)
# Three epochs of two steps, so that each checkpoint is of the last step of one.
EPOCHS = ("data.train_files={folder}/eight.jsonl",)
KINDS = {"grpo": (), "ppo": PPO, "dynamic sampling": FILTERED, "epochs": EPOCHS}


class Killed(BaseException):
    """Stands for the end of the process: nothing that handles errors catches it."""


def steps(folder: Path) -> list[int]:
    """The step of each line of the metrics."""
    return [json.loads(line)["step"] for line in (folder / "metrics.jsonl").read_text().splitlines()]


def killed_at(step: int, monkeypatch: pytest.MonkeyPatch, loaded: Loaded) -> None:
    """Train until the actor, or before its turn the critic, is about to be updated at a step."""
    update = Trainer.update

    def stop(self: Trainer, *arguments: Any) -> None:
        if any(isinstance(each, StepRecord) and each.step == step for each in arguments):
            raise Killed
        update(self, *arguments)

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(Trainer, "update", stop)
        train(loaded)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_a_resumed_run_ends_with_the_same_bits(
    kind: str,
    quickstart: Callable[..., Loaded],
    quickstart_inputs: Path,
    differences: Callable[..., list[str]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    rows = (quickstart_inputs / "train.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "eight.jsonl").write_text("".join(rows[:8]))
    kept = (option.format(folder=tmp_path) for option in KINDS[kind])
    options = (*SAVING, *kept, f"critic.model.path={quickstart_inputs}/model")
    train(quickstart(*options, folder="whole"))
    for step in (1, 3, STEPS):
        folder = f"killed-{step}"
        loaded = quickstart(*options, folder=folder)
        killed_at(step, monkeypatch, loaded)
        newest = latest(tmp_path / folder).checkpoint
        assert (newest.step if newest else 0) == (step - 1) // 2 * 2
        train(loaded)
        assert differences(tmp_path / folder, tmp_path / "whole", STEPS) == []
        assert steps(tmp_path / folder) == list(range(1, STEPS + 1))


def test_a_run_killed_before_a_checkpoint_is_complete_resumes_from_the_one_before(
    quickstart: Callable[..., Loaded], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = quickstart("trainer.save_freq=1", "trainer.resume_mode=auto")
    collect = RolloutCollector.collect

    def stop(self: RolloutCollector, step: int, state: TrainState) -> Any:
        if step == 3:
            raise Killed
        return collect(self, step, state)

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(RolloutCollector, "collect", stop)
        train(loaded)
    newest = latest(tmp_path / "run").checkpoint
    assert newest is not None and newest.step == 1
    train(loaded)
    assert steps(tmp_path / "run") == [1, 2, 3]
    assert not [path for path in (tmp_path / "run").iterdir() if path.name.startswith(".global_step")]


def test_the_folder_for_transformers_holds_the_trained_weights(
    quickstart: Callable[..., Loaded], quickstart_inputs: Path, tmp_path: Path
) -> None:
    contents = "actor_rollout_ref.actor.checkpoint.save_contents=[model,optimizer,extra,hf_model]"
    train(quickstart("trainer.total_training_steps=1", "trainer.save_freq=1", contents))
    actor = tmp_path / "run" / "global_step_1" / "actor"
    saved = SavedTensors(actor)
    model = AutoModelForCausalLM.from_pretrained(actor / "huggingface")
    for name, weight in model.named_parameters():
        assert torch.equal(weight, saved.read(f"model.{name}"))
    before = AutoModelForCausalLM.from_pretrained(quickstart_inputs / "model")
    assert not torch.equal(model.get_input_embeddings().weight, before.get_input_embeddings().weight)
    tokenizers = (
        AutoTokenizer.from_pretrained(path) for path in (actor / "huggingface", quickstart_inputs / "model")
    )
    prompts = [each.apply_chat_template([{"role": "user", "content": "a word"}]) for each in tokenizers]
    assert prompts[0] == prompts[1]


def test_a_finished_run_has_nothing_left_to_do_until_it_is_made_longer(
    quickstart: Callable[..., Loaded], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ("trainer.save_freq=1", "trainer.resume_mode=auto")
    train(quickstart("trainer.total_training_steps=1", *options))
    before = (tmp_path / "run" / "metrics.jsonl").read_bytes()
    capsys.readouterr()
    train(quickstart("trainer.total_training_steps=1", *options))
    assert "nothing is left to do" in capsys.readouterr().out
    assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == before
    train(quickstart("trainer.total_training_steps=2", *options))
    assert steps(tmp_path / "run") == [1, 2]
    with pytest.raises(CheckpointError, match="training prompts: "):
        train(
            quickstart(
                "trainer.total_training_steps=3",
                *options,
                "data.train_files=${data.val_files}",
                "data.train_batch_size=2",
                "actor_rollout_ref.actor.ppo_mini_batch_size=2",
            )
        )


def test_a_checkpoint_without_the_optimizer_is_refused_with_a_way_to_go_on(
    quickstart: Callable[..., Loaded], tmp_path: Path
) -> None:
    options = ("trainer.save_freq=1", "trainer.resume_mode=auto")
    contents = "actor_rollout_ref.actor.checkpoint.save_contents=[model,extra]"
    train(quickstart("trainer.total_training_steps=1", *options, contents))
    with pytest.raises(
        CheckpointError, match=r"global_step_1 cannot be resumed:\nit was saved without optimizer"
    ) as told:
        train(quickstart(*options))
    assert "iiverl export" in str(told.value)


def test_a_full_disk_ends_the_run_and_loses_nothing(
    quickstart: Callable[..., Loaded],
    differences: Callable[..., list[str]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    options = ("trainer.save_freq=1", "trainer.max_actor_ckpt_to_keep=1")
    train(quickstart(*options, folder="whole"))
    free, needed = shutil.disk_usage(tmp_path), checkpoints(tmp_path / "whole")[-1].size

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda path: free._replace(free=needed // 2))
        with pytest.raises(CheckpointError, match=r"A checkpoint takes about [\d.]+ MiB, and .* KiB left"):
            train(quickstart(*options, "trainer.resume_mode=auto"))
    assert steps(tmp_path / "run") == []  # it ends before the first

    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    write = _FileSystemWriter.write_data

    def refuse(self: Any, plan: Any, planner: Any) -> Any:
        if ".global_step_2." in str(self.path):
            raise full
        return write(self, plan, planner)

    with monkeypatch.context() as patch, pytest.raises(CheckpointError, match="No space left on device"):
        patch.setattr(_FileSystemWriter, "write_data", refuse)
        train(quickstart(*options, "trainer.resume_mode=auto"))
    newest = latest(tmp_path / "run").checkpoint
    assert newest is not None and newest.step == 1
    train(quickstart(*options, "trainer.resume_mode=auto"))
    assert differences(tmp_path / "run", tmp_path / "whole", 3) == []


def test_weights_for_transformers_that_cannot_be_written_end_the_run(
    quickstart: Callable[..., Loaded], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are written in the background."""

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("iiverl_core.training.model_folder.save_file", full)
    contents = "actor_rollout_ref.actor.checkpoint.save_contents=[model,optimizer,extra,hf_model]"
    with pytest.raises(CheckpointError, match=r"the actor for transformers: .*No space left on device"):
        train(quickstart("trainer.save_freq=1", contents))
    assert steps(tmp_path / "run") == [1]
    assert latest(tmp_path / "run").checkpoint is None


def test_the_expected_size_of_a_checkpoint_is_that_of_its_files(
    quickstart: Callable[..., Loaded], tmp_path: Path
) -> None:
    for contents in ("[model,optimizer,extra]", "[model,extra]", "[model,optimizer,extra,hf_model]"):
        loaded = quickstart(
            "trainer.total_training_steps=1",
            "trainer.save_freq=1",
            f"actor_rollout_ref.actor.checkpoint.save_contents={contents}",
        )
        train(loaded)
        size = checkpoint_size(loaded.run, find_facts(loaded.run))
        assert size.total == size.per_rank  # of one process
        written = checkpoints(tmp_path / "run")[-1].size
        assert size.total < written < 1.25 * size.total  # the index of a small model counts


def test_a_request_to_stop_ends_the_run_with_a_checkpoint(
    quickstart: Callable[..., Loaded], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stop = Stop()
    assert not stop.request(143)  # nothing heeds it yet
    step = Trainer.step

    def requested(self: Trainer, number: int) -> Any:
        if number == 2:
            assert stop.request(143)
            assert not stop.request(143)
        return step(self, number)

    monkeypatch.setattr(Trainer, "step", requested)
    train(quickstart("trainer.save_freq=100", "trainer.resume_mode=auto"), stop)
    newest = latest(tmp_path / "run").checkpoint
    assert newest is not None and newest.step == 2
    assert stop.exit_code == 143
    train(quickstart("trainer.save_freq=100", "trainer.resume_mode=auto"))
    assert steps(tmp_path / "run") == [1, 2, 3]


DIVERGING = (
    "actor_rollout_ref.actor.use_kl_loss=true",
    "actor_rollout_ref.actor.kl_loss_coef=1.0e+39",
    "trainer.max_nonfinite_updates=2",
    "trainer.save_freq=1",
)


def test_gradients_that_are_not_finite_end_the_run_and_keep_the_step(
    quickstart: Callable[..., Loaded], tmp_path: Path
) -> None:
    with pytest.raises(
        NonFiniteError, match="gradient of the actor was not finite in 2 updates in a row, the last at step 2"
    ) as told:
        train(quickstart(*DIVERGING))
    folder = tmp_path / "run" / "nonfinite"
    for named in (folder / "2.parquet", tmp_path / "run" / "global_step_1"):
        assert str(named) in str(told.value) and named.exists()
    # What the message says is done: the step again, whose gradient is not finite again.
    command = str(told.value).partition("computes the step again: iiverl ")[2].splitlines()[0]
    again = CliRunner().invoke(app, shlex.split(command))
    assert again.exit_code == 0, again.output
    assert "actor/skipped_updates" in again.output


def test_an_update_that_cannot_be_kept_is_not_named(
    quickstart: Callable[..., Loaded],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "nonfinite").write_text("no folder")
    with pytest.raises(NonFiniteError) as told:
        train(quickstart(*DIVERGING))
    assert "/nonfinite" not in str(told.value)
    printed = capsys.readouterr()
    assert (printed.out + printed.err).count("cannot be written") == 2


@pytest.mark.parametrize("where", ["reward", "weights"])
def test_what_is_not_finite_is_one_message_with_step_sample_and_checkpoint(
    where: str, quickstart: Callable[..., Loaded], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Saved at once, so that it is certain which checkpoints there are. Weights diverge in the update of the second step.
    options = ["trainer.save_freq=1", "actor_rollout_ref.actor.checkpoint.async_save=false"]
    if where == "reward":  # the variance of such scores is infinite
        reward = tmp_path / "reward.py"
        reward.write_text(
            "calls = 0\n"
            "def compute_score(data_source, solution_str, ground_truth, extra_info=None):\n"
            "    global calls\n"
            "    calls += 1\n"
            "    return float(calls % 2) if calls <= 16 else 3e38 * (-1) ** calls\n"
        )
        options += [f"custom_reward_function.path={reward}", "algorithm.adv_estimator=rloo"]
        message = (
            r"advantage of a token of train step 2, group \d+, member \d is not finite.*score is -?3e\+38"
        )
    else:
        weights = ModelRunner.rollout_weights

        def diverged(self: ModelRunner, **options: bool) -> Any:
            for name, weight in weights(self, **options):
                yield name, weight * float("nan") if (tmp_path / "run" / "global_step_1").exists() else weight

        monkeypatch.setattr(ModelRunner, "rollout_weights", diverged)
        message = r"logits that are not finite, at token 1 of the response to request train step 3, group 0, member 0"
    with pytest.raises(NonFiniteError, match=message) as told:
        train(quickstart(*options))
    newest = {"reward": 1, "weights": 2}[where]
    assert f"The newest checkpoint is {tmp_path}/run/global_step_{newest};" in str(told.value)
    # There is a step to keep only if its responses are there.
    assert ("samples are kept" in str(told.value)) == (where == "reward")
