"""The built-in tables: all that they name exists, and says the same of itself."""

import ast
import dataclasses
import re

import pytest

from iiverl_core.algorithms import AdvantageSettings, PolicyLossSettings
from iiverl_core.config.schema import keys
from iiverl_core.installation import install_command
from iiverl_core.registry import (
    AGGREGATIONS,
    BACKENDS,
    ENGINES,
    ESTIMATORS,
    KL_KINDS,
    POLICY_LOSSES,
    REGISTRIES,
    REWARD_SOURCES,
    ROLLOUTERS,
    TRACKERS,
    AlgorithmInfo,
    Info,
    load_code,
)
from iiverl_core.registry.rewards import MANAGER_KEY

INFOS = [
    pytest.param(info, id=f"{r.label}-{info.name}")
    for r in REGISTRIES
    if r is not BACKENDS  # whose packages have tests of their own, and take long to import
    for info in r.values()
]
ALGORITHMS = [info for r in (ESTIMATORS, POLICY_LOSSES, AGGREGATIONS, KL_KINDS) for info in r.values()]


def first_sentence(text: str) -> str:
    """The first sentence on one line, without its full stop and without Markdown's marks."""
    paragraph = " ".join(text.partition("\n\n")[0].split())
    sentence = re.split(r"[.](?: (?=[A-Z])|$)", paragraph, maxsplit=1)[0]
    return re.sub(r"([`*])(\S[^`*]*)\1", r"\2", sentence)


@pytest.mark.parametrize("info", INFOS)
def test_the_code_exists_and_the_summary_is_a_line(info: Info) -> None:
    assert load_code(info.code, info.name) is not None
    assert 1 <= len(info.summary) <= 125 and not info.summary.endswith(".")


def test_nothing_is_broken_and_no_word_means_two_things() -> None:
    for registry in REGISTRIES:
        assert not registry.broken
        words = [word for info in registry.values() for word in info.names]
        assert sorted(words) == sorted(set(words)) == sorted(registry.names)


@pytest.mark.parametrize("info", ALGORITHMS, ids=lambda info: info.name)
def test_an_algorithm_says_the_same_in_its_file(info: AlgorithmInfo) -> None:
    docstring = ast.get_docstring(ast.parse(info.file.read_text(encoding="utf-8")))
    assert docstring is not None and info.documentation == docstring
    if info.name in (*AGGREGATIONS, *KL_KINDS):  # several in a file, whose docstring has a table of them
        row = next(line for line in docstring.splitlines() if line.startswith(f"| `{info.name}`"))
        assert re.findall(r"`([^`]+)`", row.split("|")[1]) == list(info.names)
    else:
        assert info.summary == first_sentence(docstring)


def test_what_is_read_are_settings_and_keys() -> None:
    settings = {
        EstimatorSettings: {field.name for field in dataclasses.fields(EstimatorSettings)}
        for EstimatorSettings in (AdvantageSettings, PolicyLossSettings)
    }
    for info in ESTIMATORS.values():
        assert set(info.reads) <= settings[AdvantageSettings]
    for info in POLICY_LOSSES.values():
        assert set(info.reads) <= settings[PolicyLossSettings]
        assert info.loss_agg_mode is None or info.loss_agg_mode in AGGREGATIONS
    for info in ENGINES.values():
        assert {f"actor_rollout_ref.rollout.{name}" for name in info.reads} <= set(keys())


def test_reward_sources_are_asked_for_by_keys() -> None:
    assert MANAGER_KEY in keys()
    assert {source.key for source in REWARD_SOURCES.values()} - {None} <= set(keys())
    without = {source.name for source in REWARD_SOURCES.values() if source.key is None}
    assert (
        without == {rollouter.reward_source for rollouter in ROLLOUTERS.values()} == {"rules", "environment"}
    )


def test_trackers_and_backends_know_what_to_install() -> None:
    assert TRACKERS["console"].missing() is None
    assert dataclasses.replace(TRACKERS["wandb"], package="no_such_package").missing() == (
        f"no_such_package is not installed; install with: {install_command('no_such_package')}"
    )
    assert install_command("iiverl[fsdp]", workspace="make setup") in (
        dataclasses.replace(BACKENDS["fsdp"], code="").missing() or ""
    )
