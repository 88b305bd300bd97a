"""Algorithms found by name: the built-in ones, and a user's own in a file."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from iiverl_cli.algorithms import EXAMPLE
from iiverl_core.algorithms import (
    AdvantageBatch,
    AdvantageSettings,
    PolicyBatch,
    PolicyLossSettings,
    Segments,
    find_estimator,
    find_policy_loss,
)
from iiverl_core.errors import ConfigError
from iiverl_core.registry import ESTIMATORS, POLICY_LOSSES

BATCH = AdvantageBatch(torch.tensor([0.0, 1.0, 3.0]), Segments.of([2, 1]), torch.tensor([0, 0]))

LOSS = """\
def reinforce(batch, settings):
    return -batch.advantages_T * batch.log_probs_T, {}
"""


@pytest.fixture
def file(tmp_path: Path) -> Callable[[str], str]:
    """Writes `my_file.py` and gives its path."""

    def write(source: str) -> str:
        path = tmp_path / "my_file.py"
        path.write_text(source)
        return str(path)

    return write


def test_built_in_names_are_found() -> None:
    for name, estimator in ESTIMATORS.items():
        found = find_estimator(name)
        assert (found.min_group_size, found.greedy_baseline) == (
            estimator.min_group_size,
            estimator.greedy_baseline,
        )
        assert found.function is estimator.load()
    for name, loss in POLICY_LOSSES.items():
        found = find_policy_loss(name)
        assert found.function is loss.load()
        assert found.loss_agg_mode == loss.loss_agg_mode
        assert (found.select_tokens is None) == (loss.select_tokens is None)


def test_the_example_that_the_command_shows_runs(file) -> None:
    estimator = find_estimator(f"{file(EXAMPLE)}:centred")
    advantages_T, returns_T = estimator(BATCH, AdvantageSettings())
    assert advantages_T.tolist() == returns_T.tolist() == [-1.0, -1.0, 1.0]
    assert estimator.min_group_size == 1


def test_a_loss_of_ones_own_is_a_function(file) -> None:
    loss = find_policy_loss(f"{file(LOSS)}:reinforce")
    batch = PolicyBatch(torch.tensor([-2.0]), torch.tensor([-2.0]), torch.tensor([0.5]), Segments.of([1]))
    assert loss(batch, PolicyLossSettings())[0].tolist() == [1.0]
    assert (loss.select_tokens, loss.loss_agg_mode) == (None, None)


def test_an_object_says_what_it_asks_of_a_step(file) -> None:
    place = file(
        "from iiverl_core.algorithms import Estimator, PolicyLoss\n"
        + EXAMPLE
        + LOSS
        + "best = Estimator(centred, min_group_size=4, greedy_baseline=True)\n"
        + "some = PolicyLoss(reinforce, select_tokens=lambda b, s: b.advantages_T > 0, loss_agg_mode='token-sum')\n"
    )
    estimator, loss = find_estimator(f"{place}:best"), find_policy_loss(f"{place}:some")
    assert (estimator.min_group_size, estimator.greedy_baseline) == (4, True)
    assert loss.select_tokens is not None
    assert loss.loss_agg_mode == "token-sum"


def test_the_path_may_begin_with_the_home_folder_or_be_relative(file, tmp_path, monkeypatch) -> None:
    file(EXAMPLE)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert find_estimator("~/my_file.py:centred")(BATCH, AdvantageSettings())[0].tolist() == [-1, -1, 1]
    monkeypatch.chdir(tmp_path)
    assert find_estimator("my_file.py:centred")(BATCH, AdvantageSettings())[0].tolist() == [-1, -1, 1]


def test_files_of_one_name_in_two_folders_are_two(tmp_path) -> None:
    source = (
        "from __future__ import annotations\nfrom dataclasses import dataclass\n@dataclass\nclass A:\n    x: float\n"
        "    def __call__(self, batch, settings):\n        return (self.x * batch.rewards_T,) * 2\nown = A({})\n"
    )
    for name, x in (("a", 1.0), ("b", 2.0)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "mine.py").write_text(source.format(x))
    first, second = (find_estimator(f"{tmp_path}/{name}/mine.py:own") for name in "ab")
    assert first(BATCH, AdvantageSettings())[0].tolist() == [0, 1, 3]
    assert second(BATCH, AdvantageSettings())[0].tolist() == [0, 2, 6]


def test_a_file_runs_once_and_again_when_it_has_changed(file, tmp_path) -> None:
    log = tmp_path / "log"
    source = f"open({str(log)!r}, 'a').write('ran ')\n"
    place = f"{file(source + EXAMPLE + LOSS)}:"
    assert find_estimator(place + "centred") == find_estimator(place + "centred")
    find_policy_loss(place + "reinforce")
    assert log.read_text() == "ran "
    file(source + EXAMPLE.replace("return advantages_T", "return 2 * advantages_T"))
    assert find_estimator(place + "centred")(BATCH, AdvantageSettings())[0].tolist() == [-2, -2, 2]
    assert log.read_text() == "ran ran "


KEYS = {
    find_estimator: "algorithm.adv_estimator",
    find_policy_loss: "actor_rollout_ref.actor.policy_loss.loss_mode",
}


@pytest.mark.parametrize("find", [find_estimator, find_policy_loss])
@pytest.mark.parametrize(
    ("source", "name", "messages"),
    [
        ("f = None\ndef other(b, s): pass\nclass Own: pass\nfrom math import sqrt", "own", ["my_file.py does not define 'own'. It defines: other, Own."]),
        ("x = 1", "own", ["It defines: no functions."]),
        ("own = 0.5", "own", ["'own' in", "my_file.py is not a function but 0.5 of type float"]),
        ("def own(batch): pass", "own", ["own in", "my_file.py takes (batch)", "too many positional", "(batch, settings)."]),
        ("def own(batch, settings, values): pass", "own", ["missing a required", "values"]),
        ("def own(*, batch, settings): pass", "own", ["takes (*, batch, settings)"]),
        ("class own:\n    def __init__(self, a, b): pass", "own", ["is a class", "an object of"]),
        ("import no_such_module", "own", ["importing", "line 1, in <module>: import no_such_module", "ModuleNotFoundError"]),
        ("def own(batch:\n", "own", ["importing", "SyntaxError", "line 1"]),
        ("def own(b, s): pass", "", ["names a file; name the", "my_file.py:my_own"]),
    ],
)  # fmt: skip
def test_what_is_wrong_is_told_with_its_place(
    file, find, source: str, name: str, messages: list[str]
) -> None:
    with pytest.raises(ConfigError) as caught:
        find(f"{file(source)}:{name}")
    for message in [f"{KEYS[find]}: ", *messages]:
        assert message in str(caught.value)
    assert "importlib" not in str(caught.value)


@pytest.mark.parametrize("find", [find_estimator, find_policy_loss])
def test_no_such_file(find, tmp_path) -> None:
    with pytest.raises(ConfigError, match=r"(adv_estimator|loss_mode): .*/missing.py does not exist"):
        find(f"{tmp_path}/missing.py:own")


def test_a_file_that_may_not_be_read(file, monkeypatch) -> None:
    def refuse(path: Path) -> bytes:
        raise PermissionError(13, "Permission denied", str(path))

    place = file(EXAMPLE)
    monkeypatch.setattr(Path, "read_bytes", refuse)
    with pytest.raises(ConfigError, match=r"adv_estimator: .*my_file.py cannot be read: Permission denied"):
        find_estimator(f"{place}:centred")


def test_no_such_name_tells_the_nearest_and_all() -> None:
    with pytest.raises(ConfigError) as caught:
        find_estimator("grop")
    assert "unknown advantage estimator 'grop'; did you mean grpo?" in str(caught.value)
    assert all(name in str(caught.value) for name in (*ESTIMATORS, "path/to/file.py:name"))
    with pytest.raises(ConfigError, match="unknown policy loss 'ppo'"):
        find_policy_loss("ppo")


WRONG_OBJECTS = [
    (find_estimator, "PolicyLoss(f)", "is an object of PolicyLoss; here goes"),
    (find_policy_loss, "Estimator(f)", "is an object of Estimator; here goes"),
    (find_estimator, "Estimator(lambda batch: 0)", "takes (batch)"),
    (find_estimator, "Estimator(f, min_group_size=0)", "min_group_size 0; it is at least 1"),
    (find_policy_loss, "PolicyLoss(f, select_tokens=lambda batch: 0)", "my_file.py:own takes (batch)"),
    (
        find_policy_loss,
        "PolicyLoss(f, loss_agg_mode='mean')",
        "loss_agg_mode 'mean'; it is one of token-mean",
    ),
]


@pytest.mark.parametrize(("find", "made", "message"), WRONG_OBJECTS)
def test_an_object_that_does_not_fit_is_told(file, find, made: str, message: str) -> None:
    source = f"from iiverl_core.algorithms import Estimator, PolicyLoss\ndef f(batch, settings): pass\nown = {made}\n"
    with pytest.raises(ConfigError) as caught:
        find(f"{file(source)}:own")
    assert message in str(caught.value)


def test_objects_of_the_file_are_among_what_it_defines(file) -> None:
    with pytest.raises(ConfigError, match=r"It defines: f, mine\."):
        find_estimator(
            file("from iiverl_core.algorithms import Estimator\ndef f(b, s): pass\nmine = Estimator(f)\n")
            + ":own"
        )


FINE = "x = batch.advantages_T * batch.log_probs_T"
WRONG_RETURNS = [
    (find_estimator, "return batch.rewards_T", "returned a tensor of shape (3,) of float32."),
    (find_estimator, "return None", "returned None."),
    (find_estimator, "return (batch.rewards_T,) * 3", "returned a tuple of 3: a tensor of shape (3,) of float32, "),
    (find_estimator, "return ()", "returned a tuple of 0: nothing."),
    (find_estimator, "return batch.rewards_T, 0.0", "returned 0.0 of type float for 3 tokens as returns_T."),
    (find_estimator, "return [x.tolist() for x in (batch.rewards_T,) * 2]", "of type list for 3 tokens as advantages_T"),
    (
        find_estimator,
        "x = batch.segments.sum(batch.rewards_T); return x, x",
        "returned a tensor of shape (2,) of float32 for 3 tokens as advantages_T.",
    ),
    (find_estimator, "return (batch.rewards_T.long(),) * 2", "returned a tensor of shape (3,) of int64 as advantages_T."),
    (find_estimator, "return (batch.rewards_T / 0,) * 2", "returned NaN for 3 of 3 tokens as advantages_T."),
    (find_estimator, "x = batch.rewards_T; return x, (x - 1).log().nan_to_num(0.0, neginf=-float('inf'))",
     "returned infinite for 1 of 3 tokens as returns_T."),
    (find_policy_loss, f"{FINE}; return x", "returned a tensor of shape (3,) of float32."),
    (find_policy_loss, f"{FINE}; return x, None", "returned None as metrics."),
    (find_policy_loss, f"{FINE}; return x.mean(), {{}}", "returned a tensor of shape () of float32 for 3 tokens as losses_T."),
    (find_policy_loss, f"{FINE}; return x / 0, {{}}", "tokens as losses_T."),
    (find_policy_loss, f"{FINE}; return x.detach(), {{}}", "without a gradient: they do not depend on batch.log_probs_T."),
    (find_policy_loss, f"{FINE}; return x, {{'kl': x.mean()}}", "returned a tensor of shape () of float32 as metric 'kl' for 3 tokens."),
    (find_policy_loss, f"{FINE}; return x, {{'kl': 0.5}}", "returned 0.5 of type float as metric 'kl' for 3 tokens."),
    (find_policy_loss, f"{FINE}; return x, {{7: x}}", "returned metrics with the name 7 of type int."),
    (find_policy_loss, f"{FINE}; return x, x", "as metrics."),
]  # fmt: skip
EXPECTED = {
    find_estimator: "It has to return (advantages_T, returns_T): two tensors of finite floats, one number per response",
    find_policy_loss: "It has to return (losses_T, metrics): a tensor of finite floats, one loss per response token",
}


def call(find, place: str) -> None:
    """Call the algorithm as a step does, on three tokens of two responses."""
    if find is find_estimator:
        find(place)(BATCH, AdvantageSettings())
    else:
        log_probs_T = torch.tensor([-1.0, -2.0, -3.0], requires_grad=True)
        batch = PolicyBatch(log_probs_T, log_probs_T.detach(), torch.tensor([1.0, 0.0, -1.0]), BATCH.segments)
        find(place)(batch, PolicyLossSettings())


@pytest.mark.parametrize(("find", "body", "message"), WRONG_RETURNS)
def test_a_wrong_return_is_one_message(file, find, body: str, message: str) -> None:
    place = file(f"def own(batch, settings):\n    {body}\n")
    with pytest.raises(ConfigError) as caught:
        call(find, f"{place}:own")
    told = str(caught.value)
    assert told.startswith(f"{KEYS[find]}: own in {place} returned ")
    assert message in told
    assert EXPECTED[find] in told
    assert told.count("\n") == 1


@pytest.mark.parametrize("mask", ["batch.advantages_T", "[True]", "(batch.advantages_T > 0)[:2]", "None"])
def test_a_wrong_choice_of_tokens_is_one_message(file, mask: str) -> None:
    place = file(
        f"from iiverl_core.algorithms import PolicyLoss\n{LOSS}own = PolicyLoss(reinforce, select_tokens=lambda batch, _: {mask})\n"
    )
    choose = find_policy_loss(f"{place}:own").select_tokens
    assert choose is not None
    with pytest.raises(ConfigError) as caught:
        choose(
            PolicyBatch(torch.zeros(3), torch.zeros(3), torch.ones(3), BATCH.segments), PolicyLossSettings()
        )
    assert f"own in {place}, select_tokens, returned " in str(caught.value)
    assert "It has to return a bool tensor, one truth value per response token." in str(caught.value)


@pytest.mark.parametrize("find", [find_estimator, find_policy_loss])
@pytest.mark.parametrize("error", ["x = helper(batch)", "raise SystemExit(3)"])
def test_an_error_shows_the_lines_of_the_users_file_alone(file, find, error: str) -> None:
    place = file(
        f"def helper(batch):\n    return batch.no_such_thing\ndef own(batch, settings):\n    {error}\n"
    )
    with pytest.raises(ConfigError) as caught:
        call(find, f"{place}:own")
    lines = str(caught.value).splitlines()
    assert lines[:2] == [f"{KEYS[find]}: own in {place} failed.", f"my_file.py, line 4, in own: {error}"]
    if "helper" in error:
        assert lines[2] == "my_file.py, line 2, in helper: return batch.no_such_thing"
        assert lines[3].startswith("AttributeError: ")
    assert len(lines) < 6
