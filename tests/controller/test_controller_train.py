"""Whole runs, without Ray: what they learn, write, and do when something goes wrong."""

import errno
import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from transformers import AutoTokenizer

from iiverl_core.config import Loaded, load
from iiverl_core.controller import train
from iiverl_core.controller.models import check_positions
from iiverl_core.controller.run_diff import CLOCKS
from iiverl_core.controller.train import prepare
from iiverl_core.errors import ConfigError, DataError, IIVerlError
from iiverl_core.rewards import TooManyFailures
from iiverl_core.telemetry import RunLock

QUICKSTART = Path(__file__).parents[2] / "examples" / "quickstart"
Make = Callable[..., Loaded]


def history(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def samples(folder: Path, step: int) -> list[dict]:
    return pq.read_table(folder / "samples" / f"{step}.parquet").to_pylist()


def without_time(records: list[dict]) -> list[dict]:
    return [{k: v for k, v in record.items() if not k.startswith(CLOCKS)} for record in records]


def reward(tmp_path: Path, body: str) -> str:
    """Write a reward function and return the override that uses it."""
    path = tmp_path / "reward.py"
    path.write_text(f"def compute_score(data_source, solution_str, ground_truth, extra_info):\n    {body}\n")
    return f"custom_reward_function.path={path}"


def test_a_run_can_be_repeated_bit_by_bit(quickstart: Make, tmp_path: Path) -> None:
    train(quickstart(folder="first"))
    train(quickstart(folder="second"))
    first, second = (without_time(history(tmp_path / name)) for name in ("first", "second"))
    assert first == second
    assert [samples(tmp_path / "first", step) for step in (1, 2, 3)] == [
        samples(tmp_path / "second", step) for step in (1, 2, 3)
    ]


def test_what_a_run_writes(
    quickstart: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "120")
    train(
        quickstart(
            "trainer.val_before_train=true", "trainer.test_freq=2", "trainer.logger=[console,tensorboard]"
        )
    )
    records = history(tmp_path / "run")
    assert [record["step"] for record in records] == [0, 1, 2, 3]
    assert [("val/test_score/echo" in record) for record in records] == [True, False, True, True]
    expected = {
        "actor/entropy_loss", "actor/pg_loss", "actor/pg_clipfrac", "actor/ppo_kl", "actor/grad_norm", "actor/lr",
        "critic/score/mean", "critic/rewards/max", "critic/advantages/min", "critic/returns/mean",
        "response_length/mean", "prompt_length/clip_ratio", "global_seqlen/balanced_max", "global_seqlen/mean",
        "timing_s/step", "timing_s/gen", "timing_s/reward", "timing_s/adv", "timing_s/update_actor",
        "timing_per_token_ms/gen", "timing_per_token_ms/update_actor", "perf/total_num_tokens", "perf/throughput",
        "perf/time_per_step", "perf/cpu_memory_used_gb",
    }  # fmt: skip
    assert expected <= records[1].keys()
    rows = samples(tmp_path / "run", 1)
    assert len(rows) == 16
    assert {row["weights_version"] for row in rows} == {0}
    assert all(row["rollout_log_prob_sum"] < 0 and row["outcome"] == "scored" for row in rows)
    for group in range(4):
        assert sum(row["advantage"] for row in rows if row["group"] == group) == pytest.approx(0, abs=1e-4)
    assert (tmp_path / "run" / "reward.png").stat().st_size > 1000
    assert any((tmp_path / "run" / "tensorboard").iterdir())
    printed = capsys.readouterr().out
    assert re.search(
        r"^step 1/3  reward \S+  kl \S+  length \S+  grad \S+  entropy .* tok/s$", printed, re.MULTILINE
    )
    assert re.search(r"^step 0/3  validation  echo \S+$", printed, re.MULTILINE)
    assert printed.count("step 1/3") == 1  # by the tracker, and not by the progress display too
    assert all(
        len(line) <= 120 for line in printed.splitlines() if line.startswith("step ")
    )  # others have paths
    assert "\x1b" not in printed
    assert "next:" in printed


def test_an_earlier_run_in_the_same_folder_is_kept_apart(quickstart: Make, tmp_path: Path) -> None:
    train(quickstart("trainer.total_training_steps=2"))
    train(quickstart("trainer.total_training_steps=1"))
    assert len(history(tmp_path / "run")) == 1
    assert len(list((tmp_path / "run").glob("metrics-*.jsonl"))) == 1
    recorded = [".json", ".parquet", ".safetensors"]
    files = {f"1{suffix}" for suffix in recorded} | {"tokenizer.json"}
    assert {path.name for path in (tmp_path / "run" / "samples").iterdir()} == files
    (kept,) = (tmp_path / "run").glob("samples-*")
    assert {path.name for path in kept.iterdir()} == files | {f"2{suffix}" for suffix in recorded}


def test_old_and_reference_log_probs_agree_with_the_engine_at_the_start(
    quickstart: Make, tmp_path: Path
) -> None:
    """Before the first update, the policy, the reference and the engine are the same model."""
    train(
        quickstart(
            "trainer.total_training_steps=2",
            "algorithm.use_kl_in_reward=true",
            "algorithm.kl_ctrl.kl_coef=0.5",
            "actor_rollout_ref.actor.use_kl_loss=true",
            "actor_rollout_ref.actor.ppo_mini_batch_size=2",
            "actor_rollout_ref.ref.fsdp_config.mixed_precision={param_dtype: fp32}",
            "actor_rollout_ref.ref.fsdp_config.model_dtype=fp32",
        )
    )
    for row in samples(tmp_path / "run", 1):
        assert row["old_log_prob_sum"] == pytest.approx(row["rollout_log_prob_sum"], abs=1e-4)
        assert row["ref_log_prob_sum"] == pytest.approx(row["old_log_prob_sum"], abs=1e-4)
        assert row["reward"] == pytest.approx(row["score"], abs=1e-4)
    second = samples(tmp_path / "run", 2)
    for row in second:
        kl = row["old_log_prob_sum"] - row["ref_log_prob_sum"]
        assert row["old_log_prob_sum"] == pytest.approx(row["rollout_log_prob_sum"], abs=1e-4)
        assert row["reward"] == pytest.approx(row["score"] - 0.5 * kl, abs=1e-4)
    assert any(abs(row["old_log_prob_sum"] - row["ref_log_prob_sum"]) > 1e-3 for row in second)
    record = history(tmp_path / "run")[1]
    assert record["critic/kl_coeff"] == 0.5
    assert record["actor/kl_coef"] == 0.001
    assert record["actor/kl_loss"] >= 0
    assert record["actor/ppo_kl"] != 0  # the second mini-batch's ratio is not 1


def test_a_known_ratio_is_not_computed(quickstart: Make, tmp_path: Path) -> None:
    train(quickstart("trainer.total_training_steps=1"))
    record = history(tmp_path / "run")[0]
    assert "timing_s/old_log_prob" not in record and "timing_s/ref" not in record
    assert record["actor/ppo_kl"] == 0


def test_one_update_with_known_ratio_equals_one_with_computed_log_probs(
    quickstart: Make, tmp_path: Path
) -> None:
    """Asking for a KL that counts nothing makes old log-probs be computed, and must change nothing else."""
    train(quickstart(folder="known"))
    computed = (
        "actor_rollout_ref.actor.use_kl_loss=true",
        "actor_rollout_ref.actor.kl_loss_coef=0.0",
        "algorithm.use_kl_in_reward=true",
        "algorithm.kl_ctrl.kl_coef=1e-12",
    )
    train(quickstart(*computed, folder="computed"))
    known, computed = (history(tmp_path / name) for name in ("known", "computed"))
    for one, other in zip(known, computed, strict=True):
        assert one["critic/score/mean"] == pytest.approx(other["critic/score/mean"])
        assert one["actor/grad_norm"] == pytest.approx(other["actor/grad_norm"], rel=1e-3)


def test_failed_samples_teach_nothing_and_are_counted(quickstart: Make, tmp_path: Path) -> None:
    flaky = reward(tmp_path, "return 1 / 0 if len(solution_str) % 2 else len(solution_str) / 10")
    train(quickstart(flaky, "reward_api.max_failed_fraction=0.9", "trainer.total_training_steps=1"))
    rows = samples(tmp_path / "run", 1)
    failed = [row for row in rows if row["outcome"] == "function"]
    assert failed and len(failed) < len(rows)
    assert all(row["score"] is None and row["advantage"] is None for row in failed)
    assert "ZeroDivisionError" in failed[0]["failure_detail"]
    record = history(tmp_path / "run")[0]
    assert record["reward/failed"] == record["reward/failed/function"] == len(failed)
    for group in range(4):
        advantages = [r["advantage"] for r in rows if r["group"] == group and r["advantage"] is not None]
        assert len(advantages) != 1
        assert sum(advantages) == pytest.approx(0, abs=1e-4)


def test_a_step_without_anything_to_compare_changes_nothing(quickstart: Make, tmp_path: Path) -> None:
    """One sample of each group has a score: there is no update, and the weights stay as they are."""
    once = (
        "k = 'seen_' + ground_truth\n"
        "    if k in globals(): raise ValueError('only one')\n"
        "    globals()[k] = True\n"
        "    return 1.0"
    )
    train(
        quickstart(
            reward(tmp_path, once), "reward_api.max_failed_fraction=0.9", "trainer.total_training_steps=2"
        )
    )
    records = history(tmp_path / "run")
    assert [record["reward/dropped_samples"] for record in records] == [16, 16]
    assert all("actor/pg_loss" not in record for record in records)
    assert {row["weights_version"] for row in samples(tmp_path / "run", 2)} == {0}


def test_too_many_failures_stop_the_run_with_the_reason(quickstart: Make, tmp_path: Path) -> None:
    with pytest.raises(TooManyFailures, match="ZeroDivisionError"):
        train(quickstart(reward(tmp_path, "return 1 / 0")))


def test_too_many_failures_in_validation_stop_the_run_before_training(
    quickstart: Make, tmp_path: Path
) -> None:
    with pytest.raises(TooManyFailures, match="64 of 64"):
        train(quickstart(reward(tmp_path, "return 1 / 0"), "trainer.val_before_train=true"))


def test_a_reward_function_that_cannot_be_loaded_is_told_before_anything_starts(
    quickstart: Make, tmp_path: Path
) -> None:
    (tmp_path / "reward.py").write_text(
        "import no_such_package_anywhere\n\n"
        "def compute_score(data_source, solution_str, ground_truth, extra_info): ...\n"
    )
    with pytest.raises(ConfigError, match="no_such_package_anywhere"):
        train(quickstart(f"custom_reward_function.path={tmp_path}/reward.py"))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("engine", ["hf", "vllm"])
def test_too_few_positions_are_found_before_a_run_for_every_engine(
    quickstart_overrides: Callable[..., list[str]], engine: str
) -> None:
    """By `iiverl validate` for a model on this machine, and by the run for one from the Hub."""
    few = "+actor_rollout_ref.model.override_config.max_position_embeddings=8"
    lengths = ("data.max_prompt_length=5", "data.max_response_length=4")
    overrides = quickstart_overrides(few, *lengths, f"actor_rollout_ref.rollout.name={engine}")
    found = load(QUICKSTART / "quickstart.yaml", overrides)
    assert "C112" in {problem.code for problem in found.errors}
    with pytest.raises(
        ConfigError, match=r"model\.path: .* has 8 positions .* a sequence has up to 9 tokens"
    ):
        check_positions(found.run)


def test_a_run_without_a_step_is_an_error(quickstart: Make, tmp_path: Path) -> None:
    """Only the length filter shows here that too few prompts are left for one step, and enough for a generation batch."""
    prompts = ["a"] * 4 + ["abcdefgh"] * 4
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps({"prompt": each, "ground_truth": "1"}) + "\n" for each in prompts))
    filtered = (
        f"data.train_files={data}",
        "data.max_prompt_length=5",
        "data.filter_overlong_prompts=true",
        "data.train_batch_size=8",
        "data.gen_batch_size=2",
        "algorithm.filter_groups.enable=true",
        "trainer.total_training_steps=null",
        "trainer.total_epochs=2",
    )
    with pytest.raises(DataError, match=r"4 prompts.*data.train_batch_size: 8"):
        prepare(quickstart(*filtered))
    with pytest.raises(DataError, match=r"4 prompts.*data.gen_batch_size: 6"):
        prepare(quickstart(*filtered, "data.gen_batch_size=6"))
    assert prepare(quickstart(*filtered, "data.train_batch_size=4")).total_steps == 2
    assert prepare(quickstart(*filtered, "trainer.total_training_steps=3")).total_steps == 3


@pytest.mark.parametrize("key", ["default_local_dir", "rollout_data_dir", "validation_data_dir"])
def test_folders_are_tried_before_anything_starts(quickstart: Make, tmp_path: Path, key: str) -> None:
    loaded = quickstart(f"trainer.{key}=/proc/no/such/folder")  # root may write everywhere but there
    with pytest.raises(ConfigError, match=rf"^trainer.{key}: /proc/no/such/folder cannot be written"):
        train(loaded)
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_a_run_goes_on_without_samples_that_cannot_be_written(
    quickstart: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("iiverl_core.controller.observer.write_samples", full)
    train(
        quickstart(
            "trainer.total_training_steps=2",
            "trainer.val_before_train=true",
            f"trainer.validation_data_dir={tmp_path}/val",
        )
    )
    assert [record["step"] for record in history(tmp_path / "run")] == [0, 1, 2]
    printed = capsys.readouterr()
    for key in ("rollout_data_dir", "validation_data_dir"):
        assert (printed.out + printed.err).count(f"trainer.{key}: the samples could not be written") == 1


def test_a_second_run_in_the_same_folder_leaves_the_first_alone(quickstart: Make, tmp_path: Path) -> None:
    metrics = tmp_path / "run" / "metrics.jsonl"
    with RunLock(tmp_path / "run", print):
        metrics.write_text('{"step": 1}\n')
        with pytest.raises(IIVerlError, match="is in use by another run"):
            train(quickstart())
        assert metrics.read_text() == '{"step": 1}\n'
        assert {each.name for each in (tmp_path / "run").iterdir()} == {"metrics.jsonl", "run.lock"}


def test_a_run_that_cannot_start_leaves_no_folder(quickstart: Make, tmp_path: Path) -> None:
    (tmp_path / "reward.py").write_text("import no_such_module\n\n\ndef compute_score(**_):\n    return 0\n")
    with pytest.raises(IIVerlError, match=r"reward\.py"):
        train(quickstart(f"custom_reward_function.path={tmp_path}/reward.py"))
    assert not (tmp_path / "run").exists()


def test_a_turn_that_ends_with_no_end_of_sentence_token_is_a_warning(
    quickstart: Make, quickstart_inputs: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """As for a base model with the chat template of the instruct model."""
    prepare(quickstart())
    assert "ends a turn" not in caplog.text
    model = shutil.copytree(quickstart_inputs / "model", tmp_path / "base")
    tokenizer = AutoTokenizer.from_pretrained(model)
    (other,) = tokenizer.encode("a", add_special_tokens=False)
    tokenizer.eos_token = tokenizer.convert_ids_to_tokens(other)
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m.content }}{{ '<end>' if m.role == 'assistant' }}{% endfor %}="
    )
    tokenizer.save_pretrained(model)
    for name in ("config.json", "generation_config.json"):
        values = json.loads((model / name).read_text())
        (model / name).write_text(json.dumps({**values, "eos_token_id": other}))
    prepare(quickstart(f"actor_rollout_ref.model.path={model}"))
    assert "The chat template ends a turn with" in caplog.text


def test_validation_only(quickstart: Make, tmp_path: Path) -> None:
    train(quickstart("trainer.val_before_train=true", "trainer.val_only=true", "data.val_batch_size=10"))
    (record,) = history(tmp_path / "run")
    assert record["step"] == 0 and 0 <= record["val/test_score/echo"] < 0.2


def test_several_epochs_and_mini_batches_make_as_many_updates(quickstart: Make, tmp_path: Path) -> None:
    train(
        quickstart(
            "actor_rollout_ref.actor.ppo_epochs=2",
            "actor_rollout_ref.actor.ppo_mini_batch_size=2",
            "actor_rollout_ref.actor.shuffle=true",
            "actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu=3",
            "trainer.total_training_steps=2",
        )
    )
    for record in history(tmp_path / "run"):
        computed = record["global_seqlen/mean"] * (1 - record["perf/shared_prompts/actor"])
        assert record["global_seqlen/balanced_max"] == pytest.approx(computed)
        assert 0 < record["perf/shared_prompts/actor"] < 0.5
        assert abs(record["actor/ppo_kl"]) > 0


def test_a_step_of_other_micro_batches_learns_the_same(quickstart: Make, tmp_path: Path) -> None:
    """In its first step: Adam makes a whole step of the rounding in a gradient of zero, and then samples come apart."""
    single = "actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu=1"
    train(quickstart("trainer.total_training_steps=1", single, folder="one"))
    packed = "actor_rollout_ref.model.use_remove_padding=true"
    train(quickstart("trainer.total_training_steps=1", packed, folder="packed"))
    (one,), (packed,) = (history(tmp_path / name) for name in ("one", "packed"))
    for name in ("critic/score/mean", "actor/grad_norm", "actor/entropy_loss"):
        assert one[name] == pytest.approx(packed[name], rel=1e-5)
