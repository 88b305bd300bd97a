"""Environments of the user's: what they answer is trained around, and what they break is a failure of one rollout."""

import random
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from iiverl_core.errors import ConfigError
from iiverl_core.rollout import RolloutTokens, SamplingParams, run_rollouts
from iiverl_core.rollout.environments import OUTPUT, EnvironmentRollouter, credited
from iiverl_core.samples import TURN_REWARDS, SampledTurn, TokenSequence
from iiverl_reward_client import Failed, Scored
from rollout.scripted import ScriptedEngine, environment_run, make_tokenizer, requests_of

COUNTING = '''
import random
from iiverl_core.environment import Turn


class Environment:
    """Answers with the letters so far; ends after as many turns as the row says."""

    def __init__(self, step=0.25):
        self.step_reward = step

    def reset(self, row):
        assert row["ground_truth"] == "truth" and row["data_source"] == "test"
        assert row["prompt"] == [{"role": "user", "content": "say"}]
        self.turns, self.left = [], row["extra_info"]["turns"]
        return row["extra_info"].get("begin")

    def step(self, message):
        assert message["role"] == "assistant"
        self.turns.append(message["content"])
        return Turn(
            f"{len(self.turns)}:{''.join(self.turns)}",
            reward=self.step_reward * len(self.turns),
            done=len(self.turns) == self.left,
            info={"letters": len("".join(self.turns)), "drawn": random.random(), "last": message["content"]},
        )
'''
ASYNC = COUNTING.replace("def reset", "async def reset").replace("def step", "async def step")

FAULTY = """
import os, subprocess, sys, time
from pathlib import Path
from iiverl_core.environment import Turn


class Environment:
    def __init__(self, pids):
        self.pids = Path(pids)
        self.note(os.getpid())

    def note(self, pid):
        (self.pids / str(pid)).touch()

    def reset(self, row):
        info = row["extra_info"]
        self.fault, self.at, self.turns = info["fault"], info["at"], 0
        self.breaks = self.fault not in (None, "close", "hanging close")
        print("begun", flush=True)
        return self.broken() if self.breaks and self.at == 0 else None

    def step(self, message):
        self.turns += 1
        if self.breaks and self.turns == self.at:
            return self.broken()
        return Turn("more", reward=1.0, done=self.turns == 3)

    def close(self):
        if self.fault == "close":
            raise RuntimeError("cannot close")
        if self.fault == "hanging close":
            time.sleep(60)

    def broken(self):
        match self.fault:
            case "raise":
                raise ZeroDivisionError("broken by plan")
            case "exit":
                sys.exit(0)
            case "interrupt":
                raise KeyboardInterrupt
            case "cut":
                os._exit(7)
            case "kill":
                os.kill(os.getpid(), 9)
            case "hang":
                time.sleep(60)
            case "busy":
                while True:
                    pass
            case "children":
                self.note(subprocess.Popen(["sleep", "60"]).pid)
                os.kill(os.getpid(), 11)
            case ("garbage", value):
                return eval(value)
"""
GARBAGE = (
    "7",
    "[1, 2]",
    "[{'role': 'user'}]",
    "[{'role': 'user', 'content': 5}]",
    "[{'role': 'user', 'content': chr(0xd800)}]",
    "Turn('x', reward=float('nan'))",
    "Turn('x', reward=1e300)",
    "Turn('x', reward='1')",
    "Turn('x', done='no')",
    "Turn(['x'])",
    "Turn([{'role': 'user', 'content': 'x', 'also': object()}])",
    "Turn('', info=3)",
    "Turn([])",
    "lambda: 1",
)
FAULTS = ("raise", "exit", "interrupt", "cut", "kill", "children", "close")
SLOW_FAULTS = ("hang", "busy", "hanging close")


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer()


@pytest.fixture
def roll_out(tokenizer, tmp_path: Path) -> Callable[..., list[RolloutTokens]]:
    """Make the rollouts of rows with an environment of this code, in the order of the rows, and close all."""

    def make(code: str, infos: Sequence[Any], *, longest: int = 4, **section: Any) -> list[RolloutTokens]:
        path = tmp_path / "environments.py"
        path.write_text(code)
        rollouter = EnvironmentRollouter(environment_run(path, tmp_path / "run", **section), tokenizer)
        engine = ScriptedEngine(tokenizer, longest)
        try:
            asked = requests_of(tokenizer, infos)
            params = SamplingParams(max_tokens=rollouter._max_rest)
            done = list(run_rollouts(engine, rollouter, asked, params))
            assert engine.pending == 0
        finally:
            rollouter.close()
        return sorted(done, key=lambda each: each.id)

    return make


def texts(done: RolloutTokens) -> list[str]:
    assert done.messages is not None
    return [message["content"] for message in done.messages]


@pytest.mark.parametrize("code", [COUNTING, ASYNC], ids=["sync", "async"])
def test_turns_alternate_and_each_reward_is_at_its_last_token(roll_out, tokenizer, code) -> None:
    for turns, done in zip((1, 2, 3), roll_out(code, [{"turns": n} for n in (1, 2, 3)]), strict=True):
        assert isinstance(done.outcome, Scored)
        assert done.outcome.score == 0.25 * sum(range(1, turns + 1))
        assert done.outcome.info["last"] == texts(done)[-1]
        assert done.outcome.components["letters"] == sum(len(text) for text in texts(done)[1::2])
        assert [turn.message for turn in done.turns] == list(range(1, 2 * turns, 2))
        assert [turn.reward for turn in done.turns] == [0.25 * (n + 1) for n in range(turns)]
        (sequence,) = done.sequences
        whole = tokenizer.apply_chat_template(list(done.messages), return_dict=False)
        assert sequence.token_ids.tolist() == whole
        sampled = np.split(np.flatnonzero(sequence.loss_mask), np.cumsum([t.tokens for t in done.turns])[:-1])
        for positions, turn in zip(sampled, done.turns, strict=True):
            text = tokenizer.decode(sequence.token_ids[positions])
            assert text == done.messages[turn.message]["content"] + "<end>"
        ends = np.cumsum([turn.tokens for turn in done.turns]) - 1
        rewards = np.zeros(sequence.trained, dtype=np.float32)
        rewards[ends] = [turn.reward for turn in done.turns]
        assert sequence.extras[TURN_REWARDS].tolist() == rewards.tolist()
        assert tokenizer.decode(done.response_ids, skip_special_tokens=True) == texts(done)[-1]


def test_the_environment_may_write_the_first_messages(roll_out, tokenizer) -> None:
    begin = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "go"}]
    first, second = roll_out(COUNTING, [{"turns": 1, "begin": begin}, {"turns": 1, "begin": "go"}])
    assert list(first.messages[:2]) == begin and second.messages[0] == begin[1]
    for done in (first, second):
        assert done.sequences[0].token_ids.tolist() == tokenizer.apply_chat_template(
            list(done.messages), return_dict=False
        )


@pytest.mark.parametrize(
    ("limits", "turns", "reason"),
    [
        ({"max_assistant_turns": 2}, 2, "stop"),
        ({"max_user_turns": 3}, 4, "stop"),
        ({"responses": 20}, None, "length"),
        ({"max_turn_length": 1, "max_assistant_turns": 3}, 3, "stop"),
    ],
)
def test_a_rollout_ends_at_its_limits_and_has_its_rewards_so_far(roll_out, limits, turns, reason) -> None:
    (done,) = roll_out(COUNTING, [{"turns": 100}], **limits)
    assert isinstance(done.outcome, Scored) and done.finish_reason == reason
    count = len(done.turns)
    assert turns is None or count == turns
    assert done.outcome.score == 0.25 * sum(range(1, count + 1))
    (sequence,) = done.sequences
    assert sequence.loss_mask[-1] and sequence.trained == sum(turn.tokens for turn in done.turns)
    if "responses" in limits:
        assert 1 < len(sequence.token_ids) - len(done.prompt.ids) <= 20
    if "max_turn_length" in limits:
        assert {turn.tokens for turn in done.turns} == {1}


def test_random_numbers_depend_on_the_rollout_alone(roll_out) -> None:
    infos = [{"turns": 3}] * 6
    drawn = [
        [done.outcome.info | done.outcome.components for done in roll_out(COUNTING, infos, workers=workers)]
        for workers in (1, 6)
    ]
    assert drawn[0] == drawn[1]
    assert len({each["drawn"] for each in drawn[0]}) == 6


def schedule(seed: int, faults: Sequence[str]) -> list[dict[str, Any]]:
    """Faults of rollouts, half of which have none."""
    rng = random.Random(seed)
    infos = []
    for _ in range(len(faults)):
        fault: Any = rng.choice([None, *faults])
        if fault == "garbage":
            fault = ("garbage", rng.choice(GARBAGE))
        infos.append({"fault": fault, "at": rng.randrange(4)})
    return infos


def alive(pid: str) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def check_faults(roll_out, tmp_path: Path, infos: list[dict[str, Any]], **section: Any) -> None:
    """Rollouts without a fault are what they are when all are; the others have no score, and nothing runs on."""
    pids = tmp_path / "pids"
    pids.mkdir(exist_ok=True)
    section |= {"kwargs": {"pids": str(pids)}}
    whole = roll_out(FAULTY, [{**info, "fault": None} for info in infos], **section)
    broken = roll_out(FAULTY, infos, **section)
    for info, expected, done in zip(infos, whole, broken, strict=True):
        assert isinstance(expected.outcome, Scored) and expected.outcome.score == 3.0
        if info["fault"] in (None, "close", "hanging close"):
            assert done.outcome == expected.outcome
            assert [s.token_ids.tolist() for s in done.sequences] == [
                s.token_ids.tolist() for s in expected.sequences
            ]
            continue
        assert isinstance(done.outcome, Failed) and done.outcome.kind == "environment", info
        assert done.outcome.detail, info
        sampled = [turn.tokens for turn in done.turns]
        assert sampled == [turn.tokens for turn in expected.turns][: len(sampled)]
        assert not any(TURN_REWARDS in sequence.extras for sequence in done.sequences)
    assert pids.exists() and not [each.name for each in pids.iterdir() if alive(each.name)]


def test_what_breaks_is_a_failure_of_its_rollout(roll_out, tmp_path) -> None:
    infos = [{"fault": fault, "at": at} for at, fault in enumerate([*FAULTS, *SLOW_FAULTS], 1)]
    infos = [{**info, "at": info["at"] % 4} for info in infos]
    infos += [{"fault": ("garbage", value), "at": 1} for value in GARBAGE]
    infos += [{"fault": ("garbage", value), "at": 0} for value in GARBAGE[:5]]
    infos += [{"fault": None, "at": 0}] * 4
    check_faults(roll_out, tmp_path, infos, turn_timeout=0.7, workers=6)


@pytest.mark.slow
@pytest.mark.alone
def test_two_hundred_random_schedules(roll_out, tmp_path) -> None:
    for seed in range(4):
        infos = schedule(seed, [*FAULTS, *SLOW_FAULTS, *["garbage"] * 4, *[None] * 8] * 3)[:50]
        check_faults(roll_out, tmp_path, infos, turn_timeout=1.0, workers=8)


def test_a_failure_says_what_the_environment_did(roll_out, tmp_path) -> None:
    (tmp_path / "pids").mkdir()
    wanted = {
        "raise": "ZeroDivisionError: broken by plan",
        "cut": "Environment.step ended its process (exit code 7)",
        "kill": "Environment.step ended its process (signal 9, SIGKILL)",
        "hang": "Environment.step took longer than 0.5 s (actor_rollout_ref.rollout.multi_turn.environment.turn_timeout)",
        ("garbage", "7"): "Environment.step in environments.py returned 7 of type int, which is not a Turn",
    }
    infos = [{"fault": fault, "at": 2} for fault in wanted]
    section = {"kwargs": {"pids": str(tmp_path / "pids")}, "turn_timeout": 0.5}
    for text, done in zip(wanted.values(), roll_out(FAULTY, infos, **section), strict=True):
        assert isinstance(done.outcome, Failed) and text in done.outcome.detail
        assert len(done.turns) == 2 and [turn.reward for turn in done.turns] == [1.0, None]
    assert "in broken" in roll_out(FAULTY, infos[:1], **section)[0].outcome.detail
    assert "begun\n" in (tmp_path / "run" / OUTPUT).read_text()


def test_all_calls_of_a_rollout_have_a_limit_together(roll_out) -> None:
    slow = COUNTING.replace("self.turns.append", "__import__('time').sleep(0.2); self.turns.append")
    (done,) = roll_out(slow, [{"turns": 50}], rollout_timeout=0.5, turn_timeout=0.4)
    assert isinstance(done.outcome, Failed) and "rollout_timeout" in done.outcome.detail
    assert 1 <= len(done.turns) <= 3


def test_a_file_that_cannot_be_loaded_is_an_error_of_the_configuration(roll_out) -> None:
    with pytest.raises(ConfigError, match=r"importing .*environments.py failed"):
        roll_out("import nothing_like_it\n" + COUNTING, [{}])


def test_what_an_environment_leaves_behind_does_not_break_the_next(roll_out) -> None:
    bomb = COUNTING.replace(
        "def step",
        "def close(self):\n"
        "        import os, threading\n"
        "        threading.Timer(0.05, os._exit, (1,)).start()\n\n"
        "    def step",
    ).replace("def reset(self, row):", "def reset(self, row):\n        __import__('time').sleep(0.1)")
    done = roll_out(bomb, [{"turns": 1}] * 4, workers=1)
    assert all(isinstance(each.outcome, Scored) for each in done)


def test_the_environment_of_the_documentation_works(roll_out) -> None:
    page = (Path(__file__).parents[2] / "docs" / "multi-turn.md").read_text()
    code = page.partition("```python\n# words.py\n")[2].partition("```")[0]
    (done,) = roll_out(code, [{}], responses=200, max_assistant_turns=4, kwargs={"hint": True})
    assert isinstance(done.outcome, Scored) and done.outcome.score == 0 and len(done.turns) == 4
    assert texts(done)[0] == "Guess a word of 5 letters." and texts(done)[2] == "It begins with t."


def test_an_abandoned_stream_closes_environments(tokenizer, tmp_path) -> None:
    path = tmp_path / "environments.py"
    path.write_text(
        COUNTING + f"\n    def close(self):\n        open({str(tmp_path / 'closed')!r}, 'a').write('x')\n"
    )
    rollouter = EnvironmentRollouter(environment_run(path, tmp_path / "run"), tokenizer)
    asked = requests_of(tokenizer, [{"turns": 1 + 40 * (i > 0)} for i in range(4)])
    rollouts = run_rollouts(ScriptedEngine(tokenizer, 8), rollouter, asked, SamplingParams(max_tokens=64))
    next(rollouts)
    rollouts.close()
    began = time.monotonic()
    rollouter.close()
    assert time.monotonic() - began < 5
    assert 1 <= len((tmp_path / "closed").read_text()) <= 4
    rollouter.close()


def test_rewards_of_a_rewritten_context_are_in_the_sequence_of_their_turn() -> None:
    def sequence(*mask: int) -> TokenSequence:
        flags = np.array(mask, dtype=bool)
        return TokenSequence(np.arange(len(mask)), flags, np.zeros(len(mask), np.float32))

    sequences = sequence(0, 1, 1, 0, 1), sequence(0, 0, 1, 1, 1)
    turns = [SampledTurn(1, 2, 0.5), SampledTurn(3, 1, -1.0), SampledTurn(5, 3, 2.0)]
    rewards = [each.extras[TURN_REWARDS].tolist() for each in credited(sequences, turns)]
    assert rewards == [[0.0, 0.5, -1.0], [0.0, 0.0, 2.0]]
