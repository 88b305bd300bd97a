"""A reward model as a configuration asks for it: what it is shown, and what is told before the run."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from data.reward_tokenizer import reward_tokenizer
from iiverl_core.config import RunConfig, build, run_config
from iiverl_core.errors import ConfigError
from iiverl_core.rewards import (
    Scorer,
    add_reward_model,
    check_prompts,
    check_reward_model,
    make_scorer,
)
from iiverl_core.samples import Rollout, SampleId, SequenceRef, TokenSequence
from iiverl_reward_client import Failed, Outcome, Scored
from rollouts import id_of

Make = Callable[..., Rollout]

CHAT = ({"role": "user", "content": "2+3?"},)


@pytest.fixture
def config_of(tmp_path: Path, tiny_model_path: Path) -> Callable[..., RunConfig]:
    """Makes a configuration with a reward model, whose tokenizer is in a folder."""
    folder = tmp_path / "reward-model"
    reward_tokenizer().save_pretrained(folder)

    def make(sections: dict[str, Any] | None = None, **reward_model: Any) -> RunConfig:
        model = {"path": str(folder)} | reward_model.pop("model", {})
        config = build(
            {
                "data": {"max_prompt_length": 256, "max_response_length": 256},
                "actor_rollout_ref": {"model": {"path": str(tiny_model_path)}},
                "reward_model": {"enable": True, "model": model, **reward_model},
                **(sections or {}),
            }
        )
        return run_config(config)

    return make


@pytest.fixture
def sample(make_sample: Make) -> Rollout:
    """A response to a chat, whose data source no built-in rule knows."""
    made = make_sample("five", "5", "acme/sonnets", extra_info={"weight": 2})
    return replace(made, prompt=replace(made.prompt, chat=CHAT))


def collected(scorer: Scorer, *samples: Rollout) -> dict[SampleId, Outcome]:
    try:
        for sample in samples:
            scorer.submit(sample)
        return dict(scorer.collect([sample.id for sample in samples]))
    finally:
        scorer.close()


def test_a_reward_model_stands_in_for_the_rules_and_beside_all_else(
    config_of: Callable[..., RunConfig], sample: Rollout, tmp_path: Path
) -> None:
    assert make_scorer(config_of()) is None
    file = tmp_path / "own.py"
    file.write_text(
        "def compute_score(data_source, solution_str, ground_truth, extra_info): return len(solution_str)"
    )
    config = config_of({"custom_reward_function": {"path": str(file)}})
    scorer = add_reward_model(config, make_scorer(config), lambda samples: [0.5 for _ in samples])
    parts = {"reward_model": 0.5, "custom_reward_function": 4.0}
    assert collected(scorer, sample) == {id_of(0, 0): Scored(4.5, parts)}


def test_the_model_is_shown_the_whole_conversation_in_its_own_tokens(
    config_of: Callable[..., RunConfig], sample: Rollout
) -> None:
    shown: dict[SampleId, TokenSequence] = {}

    def score(sequences: Mapping[SampleId, TokenSequence]) -> list[float]:
        shown.update(sequences)
        return [float(each.token_ids.sum()) for each in sequences.values()]

    messages = [*CHAT, {"role": "assistant", "content": "five"}]
    ids = reward_tokenizer().apply_chat_template(messages, tokenize=True, return_dict=False)
    outcomes = collected(add_reward_model(config_of(), None, score), sample)
    assert outcomes == {id_of(0, 0): Scored(float(sum(ids)), {"reward_model": float(sum(ids))})}
    assert list(shown) == [sample.id]
    assert shown[sample.id].token_ids.tolist() == ids
    assert shown[sample.id].trained == 0


def test_a_model_with_the_policys_tokenizer_is_shown_samples_as_they_are(
    config_of: Callable[..., RunConfig], sample: Rollout, tmp_path: Path
) -> None:
    shown: list[SequenceRef] = []
    config = config_of(model={"path": str(tmp_path / "none"), "input_tokenizer": None})
    check_reward_model(config)
    check_prompts(config, [sample.prompt])
    collected(
        add_reward_model(config, None, lambda each: [shown.append(s) or 0.0 for s in each.values()]), sample
    )
    assert shown == list(sample.sequences)


def test_a_conversation_that_is_too_long_fails_by_itself(
    config_of: Callable[..., RunConfig], sample: Rollout
) -> None:
    config = config_of(max_length=40, truncation="error")
    longer = replace(sample, id=id_of(0, 1), text="five" * 10)
    outcomes = collected(add_reward_model(config, None, lambda samples: [1.0] * len(samples)), sample, longer)
    assert outcomes[id_of(0, 0)] == Scored(1.0, {"reward_model": 1.0})
    failed = outcomes[id_of(0, 1)]
    assert isinstance(failed, Failed)
    assert failed.kind == "function"
    assert failed.detail.startswith(f"{sample.prompt.place}: the prompt and its response are ")


def test_what_the_model_cannot_read_is_told_before_the_run(
    config_of: Callable[..., RunConfig], sample: Rollout, tmp_path: Path
) -> None:
    config = config_of()
    check_reward_model(config)
    check_prompts(config, [sample.prompt])  # no rule is asked for its data source
    refusing = reward_tokenizer()
    refusing.chat_template = "{{ raise_exception('only one message') }}"
    refusing.save_pretrained(tmp_path / "refusing")
    config = config_of(model={"path": str(tmp_path / "refusing")})
    check_reward_model(config)
    with pytest.raises(ConfigError, match=r", row 0 \(the first is 0\): the prompt .* only one message"):
        check_prompts(config, [sample.prompt])
    bare = reward_tokenizer()
    bare.chat_template = None
    bare.save_pretrained(tmp_path / "bare")
    config = config_of(model={"path": str(tmp_path / "bare")})
    check_prompts(config, [replace(sample.prompt, chat=None)])
    with pytest.raises(ConfigError, match="has no chat template"):
        check_prompts(config, [sample.prompt])
    with pytest.raises(ConfigError, match="there is no folder"):
        check_reward_model(config_of(model={"path": str(tmp_path / "none")}))


def test_without_a_reward_model_nothing_is_loaded_for_it(config_of: Callable[..., RunConfig]) -> None:
    check_reward_model(config_of(enable=False, model={"path": "no-such-model"}))
