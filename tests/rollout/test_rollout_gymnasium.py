"""Environments of gymnasium: its own text renderings and actions, and an environment with spaces of texts."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gymnasium
import pytest
from gymnasium.spaces import Text

from iiverl_core.config import build, run_config
from iiverl_core.errors import ConfigError
from iiverl_core.gymnasium_environment import GymnasiumEnvironment
from iiverl_core.rollout import SamplingParams, run_rollouts
from iiverl_core.rollout.environments import EnvironmentRollouter
from iiverl_reward_client import Failed, Scored
from rollout.scripted import ScriptedEngine, make_tokenizer, requests_of

ACTIONS = ["left", "down", "right", "up"]
ROW = {"prompt": [{"role": "user", "content": "Reach the goal."}], "seed": 7}


class Echo(gymnasium.Env[str, str]):
    """Says back what it hears; a text of two letters ends the episode."""

    observation_space = Text(20)
    action_space = Text(4, charset="abcdefghijklmnopqrstuvwxyz")
    render_mode = None

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[str, dict[str, Any]]:
        super().reset(seed=seed)
        self.drawn = int(self.np_random.integers(1000))
        return f"say {self.drawn}", {}

    def step(self, action: str) -> tuple[str, float, bool, bool, dict[str, Any]]:
        return f"heard {action}", len(action) / 4, len(action) == 2, False, {"letters": len(action)}


gymnasium.register("Echo-v0", Echo, disable_env_checker=True)


def test_a_lake_is_crossed_by_the_names_of_actions() -> None:
    env = GymnasiumEnvironment("FrozenLake-v1", ACTIONS, render_mode="ansi", is_slippery=False)
    (first,) = env.reset(ROW)
    assert first["content"].startswith("Reach the goal.\n\n") and "SFFF\nFHFH" in first["content"]
    assert "\x1b" not in first["content"]
    turns = [env.step({"role": "assistant", "content": f" {ACTIONS[i]}\n"}) for i in (1, 1, 2, 2, 1, 2)]
    assert [turn.reward for turn in turns] == [0, 0, 0, 0, 0, 1]
    assert [turn.done for turn in turns] == [False] * 5 + [True]
    assert "(Down)" in str(turns[0].messages)
    env.close()


@pytest.mark.parametrize("said", ["north", "", "1", "left left"])
def test_an_action_that_is_none_changes_nothing(said: str) -> None:
    env = GymnasiumEnvironment("FrozenLake-v1", ACTIONS, render_mode="ansi", is_slippery=False)
    env.reset(ROW)
    turn = env.step({"role": "assistant", "content": said})
    assert turn.messages == "Invalid action: write one of left, down, right, up."
    assert (turn.reward, turn.done, turn.info) == (0, False, {"invalid_actions": 1})
    assert "(Right)" in str(env.step({"role": "assistant", "content": "right"}).messages)


def test_actions_without_names_are_numbers() -> None:
    env = GymnasiumEnvironment("FrozenLake-v1", render_mode="ansi", is_slippery=False)
    env.reset(ROW)
    for said in ("4", "-1", "down", "9" * 12):
        turn = env.step({"role": "assistant", "content": said})
        assert turn.messages == "Invalid action: write a number from 0 to 3."
    assert "(Up)" in str(env.step({"role": "assistant", "content": "3"}).messages)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"id": "CartPole-v1"}, "the observations of CartPole-v1 are Box"),
        ({"id": "FrozenLake-v1"}, "set render_mode to ansi"),
        ({"id": "FrozenLake-v1", "render_mode": "ansi", "actions": ["up"]}, "1 actions have names"),
    ],
)
def test_what_is_not_text_is_refused(kwargs: Mapping[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        GymnasiumEnvironment(**kwargs)


def test_texts_are_actions_and_episodes_depend_on_their_seeds() -> None:
    env = GymnasiumEnvironment("Echo-v0")
    begun = [env.reset({"prompt": "Speak.", "seed": seed})[0]["content"] for seed in (1, 2, 1)]
    assert begun[0] == begun[2] != begun[1] and begun[0].startswith("Speak.\n\nsay ")
    assert env.step({"role": "assistant", "content": "abc"}).messages == "heard abc"
    assert str(env.step({"role": "assistant", "content": "ABC"}).messages).startswith("Invalid action")
    last = env.step({"role": "assistant", "content": "ab"})
    assert (last.reward, last.done) == (0.5, True)
    assert last.info == {"letters": 2, "invalid_actions": 1}


def rollouter_of(folder: Path, name: str, **kwargs: Any) -> EnvironmentRollouter:
    environment = {"name": name, "kwargs": kwargs, "workers": 3}
    rollout = {
        "name": "hf",
        "agent": {"default_agent_loop": "environment"},
        "multi_turn": {"max_assistant_turns": 4, "environment": environment},
    }
    lengths = {"max_prompt_length": 64, "max_response_length": 400}
    trainer = {"default_local_dir": str(folder)}
    run = run_config(build({"actor_rollout_ref": {"rollout": rollout}, "data": lengths, "trainer": trainer}))
    return EnvironmentRollouter(run, make_tokenizer())


def test_the_yaml_names_the_class_and_its_environment(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.syspath_prepend(Path(__file__).parents[1])  # where the environment's processes find Echo
    rollouter = rollouter_of(
        tmp_path,
        "iiverl_core.gymnasium_environment:GymnasiumEnvironment",
        id="rollout.test_rollout_gymnasium:Echo-v0",
    )
    tokenizer = make_tokenizer()
    done = list(
        run_rollouts(ScriptedEngine(tokenizer), rollouter, requests_of(tokenizer, [{}] * 6), SamplingParams())
    )
    rollouter.close()
    assert len(done) == 6
    for each in done:
        assert isinstance(each.outcome, Scored), each.outcome
        words = [m["content"] for m in each.messages or () if m["role"] == "assistant"]
        assert 1 <= len(words) <= 4 and all(len(word) != 2 for word in words[:-1])
        assert each.outcome.score == sum(len(word) / 4 for word in words)
        assert each.outcome.components == {"letters": len(words[-1]), "invalid_actions": 0}


@pytest.mark.parametrize(
    ("name", "message"),
    [("no_such_module:Maze", "importing no_such_module failed"), ("json:Maze", "does not define 'Maze'")],
)
def test_a_class_that_is_not_there_ends_the_run(tmp_path: Path, name: str, message: str) -> None:
    rollouter, tokenizer = rollouter_of(tmp_path, name), make_tokenizer()
    with pytest.raises(ConfigError, match=message):
        list(
            run_rollouts(ScriptedEngine(tokenizer), rollouter, requests_of(tokenizer, [{}]), SamplingParams())
        )
    rollouter.close()


def test_an_environment_that_cannot_be_made_fails_its_rollout(tmp_path: Path) -> None:
    name = "iiverl_core.gymnasium_environment:GymnasiumEnvironment"
    rollouter, tokenizer = rollouter_of(tmp_path, name, id="CartPole-v1"), make_tokenizer()
    (done,) = run_rollouts(
        ScriptedEngine(tokenizer), rollouter, requests_of(tokenizer, [{}]), SamplingParams()
    )
    rollouter.close()
    assert (
        isinstance(done.outcome, Failed) and "the observations of CartPole-v1 are Box" in done.outcome.detail
    )
