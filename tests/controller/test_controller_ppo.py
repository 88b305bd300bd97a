"""Whole runs of the family, without Ray: critic, baselines, dynamic sampling, correction, reward models."""

import json
from collections.abc import Callable
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch

from iiverl_core.config import Loaded
from iiverl_core.controller import train
from iiverl_core.controller.run_diff import CLOCKS
from iiverl_core.errors import ConfigError, IIVerlError

Make = Callable[..., Loaded]


def history(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def samples(folder: Path, step: int) -> list[dict]:
    return pq.read_table(folder / "samples" / f"{step}.parquet").to_pylist()


def reward(tmp_path: Path, body: str) -> str:
    """Write a reward function and return the override that uses it."""
    path = tmp_path / "reward.py"
    path.write_text(f"def compute_score(data_source, solution_str, ground_truth, extra_info):\n    {body}\n")
    return f"custom_reward_function.path={path}"


@pytest.fixture
def ppo(quickstart: Make, quickstart_inputs: Path) -> Make:
    """Make a configuration of PPO with a critic."""

    def make(*more: str, folder: str = "run") -> Loaded:
        return quickstart(
            "algorithm.adv_estimator=gae",
            f"critic.model.path={quickstart_inputs}/model",
            "critic.model.enable_gradient_checkpointing=false",
            "critic.model.fsdp_config.mixed_precision={param_dtype: fp32}",
            "critic.optim.lr=1e-3",
            *more,
            folder=folder,
        )

    return make


def test_what_a_run_with_a_critic_tells(ppo: Make, tmp_path: Path) -> None:
    train(ppo("actor_rollout_ref.rollout.n=1", reward(tmp_path, "return len(solution_str) / 10")))
    records = history(tmp_path / "run")
    expected = {
        "critic/vf_loss", "critic/vf_clipfrac", "critic/vpred_mean", "critic/grad_norm", "critic/lr",
        "critic/vf_explained_var", "critic/values/mean", "critic/values/max", "critic/returns/mean",
        "timing_s/values", "timing_s/update_critic", "timing_per_token_ms/values",
        "timing_per_token_ms/update_critic", "actor/pg_loss", "rollout/kl", "rollout/ratio/mean", "rollout/ratio/max",
    }  # fmt: skip
    assert [expected - record.keys() for record in records] == [set()] * 3
    assert records[0]["critic/values/mean"] == 0  # a new head
    assert records[1]["critic/values/mean"] != 0
    assert records[0]["critic/lr"] == 1e-3
    assert all(record["rollout/kl"] < 1e-6 for record in records)
    assert {row["member"] for row in samples(tmp_path / "run", 1)} == {0}


def test_a_run_with_a_critic_can_be_repeated_bit_by_bit(ppo: Make, tmp_path: Path) -> None:
    options = ("critic.ppo_epochs=2", "critic.shuffle=true", "critic.ppo_mini_batch_size=2")
    train(ppo(*options, folder="first"))
    train(ppo(*options, folder="second"))
    first, second = (
        [{k: v for k, v in record.items() if not k.startswith(CLOCKS)} for record in history(tmp_path / name)]
        for name in ("first", "second")
    )
    assert first == second


def test_the_actor_waits_for_the_critic(ppo: Make, tmp_path: Path) -> None:
    train(ppo("trainer.critic_warmup=3", "trainer.total_training_steps=4"))
    records = history(tmp_path / "run")
    assert ["actor/pg_loss" in record for record in records] == [False, False, True, True]
    assert all("critic/vf_loss" in record for record in records)
    versions = [{row["weights_version"] for row in samples(tmp_path / "run", step)} for step in (1, 2, 3, 4)]
    assert versions == [{0}, {0}, {0}, {3}]


def test_the_critic_learns_what_to_expect(ppo: Make, tmp_path: Path) -> None:
    """All responses score the same, so the values come to foresee the returns."""
    train(
        ppo(
            reward(tmp_path, "return 0.5"),
            "actor_rollout_ref.actor.optim.lr=0",
            "critic.optim.lr=1e-2",
            "trainer.total_training_steps=15",
        )
    )
    losses = [record["critic/vf_loss"] for record in history(tmp_path / "run")]
    assert losses[0] == pytest.approx(0.5 * 0.5**2)
    assert losses[-1] < losses[0] / 5


def test_a_critic_of_another_vocabulary_is_told_before_anything_starts(
    ppo: Make, tmp_path: Path, quickstart_inputs: Path
) -> None:
    folder = tmp_path / "critic"
    folder.mkdir()
    config = json.loads((quickstart_inputs / "model" / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"vocab_size": 20}))
    with pytest.raises(ConfigError, match=r"critic\.model\.path: .* knows 20 tokens"):
        train(ppo(f"critic.model.path={folder}"))


def test_remax_compares_with_the_greedy_response(quickstart: Make, tmp_path: Path) -> None:
    train(quickstart("algorithm.adv_estimator=remax"))
    for step in (1, 2, 3):
        rows = samples(tmp_path / "run", step)
        assert len(rows) == 16
        for group in range(4):
            members = [row for row in rows if row["group"] == group]
            assert len({row["baseline"] for row in members}) == 1
        for row in rows:
            assert row["advantage"] == pytest.approx(row["score"] - row["baseline"], abs=1e-5)


def test_a_group_whose_baseline_has_no_score_is_left_out(quickstart: Make, tmp_path: Path) -> None:
    """The fifth response to the first word that is asked, its baseline, cannot be scored."""
    count = (
        "calls = globals().setdefault('calls', [])\n"
        "    calls.append(ground_truth)\n"
        "    if ground_truth == calls[0] and calls.count(ground_truth) == 5: raise ValueError('no baseline')\n"
        "    return len(solution_str) / 10"
    )
    train(
        quickstart(
            "algorithm.adv_estimator=remax",
            "trainer.total_training_steps=1",
            "reward_api.max_failed_fraction=0.9",
            reward(tmp_path, count),
        )
    )
    (record,) = history(tmp_path / "run")
    assert record["reward/dropped_samples"] == 4
    rows = samples(tmp_path / "run", 1)
    without = [row for row in rows if row["baseline"] is None]
    assert len(without) == 4 and len({row["group"] for row in without}) == 1
    assert all(row["advantage"] is None and row["outcome"] == "scored" for row in without)


DYNAMIC = ("algorithm.filter_groups.enable=true", "trainer.total_training_steps=2")


def test_groups_that_teach_nothing_are_replaced(quickstart: Make, tmp_path: Path) -> None:
    """Words that begin with one of four letters score the same whatever the answer."""
    uneven = reward(tmp_path, "return 0.0 if ground_truth[0] in 'abcd' else len(solution_str) / 10")
    train(quickstart(*DYNAMIC, uneven))
    seen: set[int] = set()
    for step, record in enumerate(history(tmp_path / "run"), 1):
        rows = samples(tmp_path / "run", step)
        asked = {row["group"] for row in rows}
        used = {row["group"] for row in rows if row["advantage"] is not None}
        assert len(used) == 4 and record["train/missing_groups"] == 0
        assert len(asked) == 4 * record["train/num_gen_batches"]
        uniform = {g for g in asked if len({row["score"] for row in rows if row["group"] == g}) == 1}
        assert record["train/uniform_groups"] == len(uniform) and not uniform & used
        assert len(rows) == 4 * len(asked)
        drawn = {row["row"] for row in rows}
        assert not drawn & seen  # no prompt is asked again in an epoch
        seen |= drawn
    assert any(record["train/num_gen_batches"] > 1 for record in history(tmp_path / "run"))


def test_dynamic_sampling_ends_where_nothing_differs(quickstart: Make, tmp_path: Path) -> None:
    train(
        quickstart(*DYNAMIC, "algorithm.filter_groups.max_num_gen_batches=2", reward(tmp_path, "return 1.0"))
    )
    for record in history(tmp_path / "run"):
        assert record["train/num_gen_batches"] == 2 and record["train/missing_groups"] == 4
        assert "actor/pg_loss" not in record


def test_long_responses_are_punished_in_training_only(quickstart: Make, tmp_path: Path) -> None:
    train(
        quickstart(
            "reward_model.overlong_buffer={enable: true, len: 4, penalty_factor: 2.0}",
            reward(tmp_path, "return 1.0"),
            "trainer.val_before_train=true",
            "trainer.total_training_steps=1",
        )
    )
    rows = samples(tmp_path / "run", 1)
    for row in rows:
        penalty = min((8 - 4 - row["response_length"]) / 4, 0) * 2.0
        assert row["score"] == pytest.approx(1.0 + penalty)
        assert json.loads(row["components"])["overlong_penalty"] == pytest.approx(penalty)
    assert any(row["score"] < 1 for row in rows)
    before, after = history(tmp_path / "run")
    assert before["val/test_score/echo"] == 1.0
    assert after["reward/overlong_penalty/mean"] < 0


@pytest.mark.parametrize("cut", ["top_p=0.8", "top_k=3"])
def test_truncated_sampling_is_no_mismatch(quickstart: Make, tmp_path: Path, cut: str) -> None:
    """The trainer's log-probs are over the tokens that the engine kept: nearly half of all, and three, at the beginning."""
    more = ("actor_rollout_ref.actor.use_dynamic_bsz=true", "actor_rollout_ref.actor.use_kl_loss=true")
    train(quickstart(f"actor_rollout_ref.rollout.{cut}", *more))
    records = history(tmp_path / "run")
    assert len(records) == 3
    for record in records:
        assert record["rollout/ratio/mean"] == pytest.approx(1.0, abs=0.002)
        assert record["rollout/ratio/max"] == pytest.approx(1.0, abs=0.01)
        assert record["rollout/kl"] < 1e-4


def test_a_mismatch_of_engine_and_trainer_is_told(
    quickstart: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    coarse = ("actor_rollout_ref.rollout.dtype=bfloat16", "actor_rollout_ref.actor.optim.lr=1e-2")
    limit = "algorithm.rollout_correction.mismatch_kl_{}=1e-9"
    train(quickstart(*coarse, limit.format("warning"), "algorithm.rollout_correction.rollout_is=token"))
    records = history(tmp_path / "run")
    assert all(record["rollout/kl"] > 1e-9 for record in records)
    assert all(record["rollout/ratio/max"] > record["rollout/ratio/mean"] for record in records)
    assert all(record["rollout/weight/mean"] == pytest.approx(1, abs=0.05) for record in records)
    assert capsys.readouterr().out.count("rollout/kl is") == 1
    with pytest.raises(IIVerlError, match="mismatch_kl_limit"):
        train(quickstart(*coarse, limit.format("limit"), folder="stopped"))


def test_the_engine_s_log_probs_replace_the_trainer_s(quickstart: Make, tmp_path: Path) -> None:
    """In fp32 both have the same log-probs up to rounding, so computing the old ones again changes nothing else."""
    common = (
        "actor_rollout_ref.actor.ppo_mini_batch_size=2",
        "algorithm.use_kl_in_reward=true",
        "algorithm.kl_ctrl.kl_coef=0.05",
        "trainer.total_training_steps=2",
    )
    train(quickstart(*common, folder="computed"))
    train(quickstart(*common, "algorithm.rollout_correction.bypass_old_log_prob=true", folder="bypassed"))
    computed, bypassed = (history(tmp_path / name) for name in ("computed", "bypassed"))
    for one, other in zip(computed, bypassed, strict=True):
        assert "timing_s/old_log_prob" in one and "timing_s/old_log_prob" not in other
        for name in ("critic/rewards/mean", "actor/pg_loss", "actor/grad_norm"):
            assert other[name] == pytest.approx(one[name], rel=1e-3, abs=1e-6)
        assert one["rollout/kl"] < 1e-9 and other["rollout/kl"] < 1e-9  # the second update's would be larger
        assert other["actor/ppo_kl"] == pytest.approx(one["actor/ppo_kl"], abs=1e-5) and one["actor/ppo_kl"]


@pytest.mark.parametrize("mode", ["clip_cov", "kl_cov"])
def test_losses_that_choose_tokens_of_the_whole_mini_batch(
    quickstart: Make, tmp_path: Path, mode: str
) -> None:
    options = {
        "clip_cov": ("clip_cov_ratio=0.2", "clip_cov_lb=0.0"),
        "kl_cov": ("kl_cov_ratio=0.2", "ppo_kl_coef=1.0"),
    }[mode]
    common = (
        f"actor_rollout_ref.actor.policy_loss.loss_mode={mode}",
        *(f"actor_rollout_ref.actor.policy_loss.{option}" for option in options),
        "actor_rollout_ref.actor.ppo_mini_batch_size=2",
    )
    train(quickstart(*common, folder="whole"))
    # Old log-probs are computed in micro-batches of the same size: the gradient of KL-Cov's |log-ratio| is 0 at 0, and 1
    # beside it, where rounding would take a first update.
    sizes = (
        "actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu=1",
        "actor_rollout_ref.rollout.log_prob_micro_batch_size_per_gpu=1",
    )
    train(quickstart(*common, *sizes, folder="single"))
    for one, other in zip(history(tmp_path / "whole"), history(tmp_path / "single"), strict=True):
        assert one["actor/grad_norm"] == pytest.approx(other["actor/grad_norm"], rel=1e-3)
        assert one["critic/score/mean"] == other["critic/score/mean"]


def test_an_estimator_and_a_loss_of_one_s_own(quickstart: Make, tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(
        "def constant(batch, settings):\n"
        "    ones = batch.rewards_T * 0 + 2.5\n"
        "    return ones, ones\n\n"
        "def reinforce(batch, settings):\n"
        "    return -batch.advantages_T * batch.log_probs_T, {'mine': batch.advantages_T}\n"
    )
    own = (
        f"algorithm.adv_estimator={tmp_path}/mine.py:constant",
        f"actor_rollout_ref.actor.policy_loss.loss_mode={tmp_path}/mine.py:reinforce",
    )
    train(quickstart(*own))
    for record in history(tmp_path / "run"):
        assert record["critic/advantages/mean"] == 2.5 and record["actor/mine"] == pytest.approx(2.5)


def random_reward_model(inputs: Path, folder: Path) -> Path:
    """Save a random sequence-classification model with the quickstart's tokenizer."""
    from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer

    config = AutoConfig.from_pretrained(inputs / "model", num_labels=1)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        model = AutoModelForSequenceClassification.from_config(config)
        torch.nn.init.normal_(model.score.weight)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(inputs / "model").save_pretrained(folder)
    return folder


REWARD_MODEL = (
    "reward_model.enable=true",
    "reward_model.model.fsdp_config={model_dtype: fp32, mixed_precision: {param_dtype: fp32}}",
)


@pytest.mark.parametrize("own_tokenizer", [False, True])
def test_a_reward_model_scores_as_transformers_by_hand(
    quickstart: Make, quickstart_inputs: Path, tmp_path: Path, own_tokenizer: bool
) -> None:
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    folder = random_reward_model(quickstart_inputs, tmp_path / "rm")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    if own_tokenizer:
        tokenizer.chat_template = (
            "{% for message in messages %}{{ message['role'][0] }}={{ message['content'] }}{% endfor %}z"
        )
        tokenizer.save_pretrained(folder)
    train(
        quickstart(
            *REWARD_MODEL,
            f"reward_model.model.path={folder}",
            "reward_model.model.input_tokenizer="
            + (f"{quickstart_inputs}/model" if own_tokenizer else "null"),
            "reward_model.micro_batch_size_per_gpu=3",
            "custom_reward_function.path=null",
            "trainer.total_training_steps=2",
            "trainer.val_before_train=true",
        )
    )
    model = AutoModelForSequenceClassification.from_pretrained(folder)
    for step in (1, 2):
        for row in samples(tmp_path / "run", step):
            word, response = row["ground_truth"], row["response"]
            if own_tokenizer:
                text = f"u={word}a={response}z"
            else:
                text = row["prompt"] + response + ("<end>" if row["finish_reason"] == "stop" else "")
            ids = tokenizer(text, add_special_tokens=False, return_tensors="pt").input_ids
            hidden = model.model(ids).last_hidden_state[0, -1]
            assert row["score"] == pytest.approx(model.score(hidden).item(), abs=1e-4)
    assert "val/test_score/echo" in history(tmp_path / "run")[0]


def test_a_reward_model_adds_to_a_function(quickstart: Make, quickstart_inputs: Path, tmp_path: Path) -> None:
    folder = random_reward_model(quickstart_inputs, tmp_path / "rm")
    train(
        quickstart(
            *REWARD_MODEL,
            f"reward_model.model.path={folder}",
            "reward_model.model.input_tokenizer=null",
            "trainer.total_training_steps=1",
        )
    )
    for row in samples(tmp_path / "run", 1):
        parts = json.loads(row["components"])
        assert len(parts) == 2 and row["score"] == pytest.approx(sum(parts.values()))


def test_several_answers_in_validation(quickstart: Make, tmp_path: Path) -> None:
    train(
        quickstart(
            "trainer.val_before_train=true",
            "trainer.val_only=true",
            "actor_rollout_ref.rollout.val_kwargs={n: 4, do_sample: true, temperature: 1.0}",
            "trainer.log_val_generations=3",
        )
    )
    (record,) = history(tmp_path / "run")
    score = record["val/test_score/echo"]
    assert record["val/test_score/echo/mean@4"] == score
    assert score <= record["val/test_score/echo/best@2"] <= record["val/test_score/echo/best@4"]
    shown = [json.loads(line) for line in (tmp_path / "run" / "generations.jsonl").read_text().splitlines()]
    assert len(shown) == 3
