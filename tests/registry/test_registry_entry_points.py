"""A registry finds the infos of other packages, and reports those that it cannot use."""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import EntryPoint
from pathlib import Path
from types import ModuleType

import pytest

from iiverl_core.config import load
from iiverl_core.errors import ConfigError
from iiverl_core.registry import ENGINES, EngineInfo, Info, Metric, Registry, RewardSource
from iiverl_core.registry import registry as mechanism

GROUP = "iiverl.things"


@dataclass(frozen=True, kw_only=True)
class Thing(Info):
    size: int = 0


@dataclass(frozen=True, kw_only=True)
class OtherThing(Info):
    pass


def thing(name: str, code: str = "math:sqrt", aliases: tuple[str, ...] = ()) -> Thing:
    return Thing(name=name, summary=f"the thing {name}", code=code, aliases=aliases)


@pytest.fixture
def offering(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Registry[Thing]]:
    """Make a registry with a built-in and an absent thing, and entry points that name the objects given."""

    def make(**offered: object) -> Registry[Thing]:
        module = ModuleType("offered_things")
        for name, value in offered.items():
            setattr(module, name, value)
        monkeypatch.setitem(sys.modules, "offered_things", module)
        entries = [EntryPoint(name, f"offered_things:{name}", GROUP) for name in offered]
        entries += [EntryPoint("gone", "offered_things:gone", GROUP)] if "broken" in offered else []
        monkeypatch.setattr(mechanism, "entry_points", lambda group: entries if group == GROUP else [])
        return Registry(
            "thing",
            GROUP,
            Thing,
            [thing("own", aliases=("mine",))],
            absent=[thing("away", code="")],
            siblings=Info,
        )

    return make


def test_names_aliases_and_order(offering: Callable[..., Registry[Thing]]) -> None:
    things = offering(first=thing("further", aliases=("far",)))
    assert list(things) == ["own", "away", "further"]
    assert things.names == ("own", "mine", "away", "further", "far")
    assert things["mine"] is things["own"] and "far" in things and "farther" not in things
    assert things.external == (things["further"],)
    assert things["further"].load()(9) == 3


def test_a_package_takes_the_place_of_what_stands_in_for_it(offering: Callable[..., Registry[Thing]]) -> None:
    assert offering()["away"].code == ""
    things = offering(here=thing("away"))
    assert things["away"].code == "math:sqrt"
    assert list(things) == ["own", "away"]


def test_infos_of_another_kind_are_of_another_registry(offering: Callable[..., Registry[Thing]]) -> None:
    things = offering(other=OtherThing(name="other", summary="another", code="math:sqrt"))
    assert "other" not in things and not things.broken


def test_what_only_iiverl_can_define_is_refused_from_a_package(monkeypatch: pytest.MonkeyPatch) -> None:
    here = ModuleType("offered_infos")
    here.source = RewardSource(name="mine", summary="scores", code="math:sqrt", key="reward_model.enable")  # type: ignore[attr-defined]
    here.metric = Metric(name="mine/{mean,max}", unit="", summary="lengths", code="math:sqrt")  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "offered_infos", here)
    for kind, name, reason in (
        (RewardSource, "source", "reward_manager selects it"),
        (Metric, "metric", "mine/{mean,max} is a pattern"),
    ):
        entries = [EntryPoint(name, f"offered_infos:{name}", GROUP)]
        monkeypatch.setattr(mechanism, "entry_points", lambda group, entries=entries: entries)
        registry = Registry(name, GROUP, kind)
        assert not registry and reason in "".join(registry.broken.values())


def test_what_cannot_be_used_is_named_with_the_reason(offering: Callable[..., Registry[Thing]]) -> None:
    things = offering(
        broken=1, cls=Thing, taken=thing("new", aliases=("mine",)), once=thing("x"), twice=thing("x")
    )
    assert list(things) == ["own", "away", "x"]
    where = {name: f"entry point {name} ({GROUP})" for name in ("broken", "cls", "taken", "twice", "gone")}
    assert things.broken == {
        where["broken"]: "offered_things:broken is an object of int, not a Info",
        where["cls"]: "offered_things:cls is a class, not a Info",
        where["taken"]: "the thing mine is already defined by iiverl",
        where["twice"]: f"the thing x is already defined by entry point once ({GROUP})",
        where["gone"]: "importing offered_things:gone failed: AttributeError: "
        "module 'offered_things' has no attribute 'gone'",
    }
    with pytest.raises(ConfigError) as caught:
        things.find("ownn", "some.key", also=" and more")
    message = str(caught.value)
    assert message.startswith(
        "some.key: unknown thing 'ownn'; did you mean own? There are own, mine, away, x and more.\n"
    )
    assert all(f"\n{entry}: {reason}" in message for entry, reason in things.broken.items())


@pytest.mark.parametrize(
    ("code", "told"),
    [
        (
            "no_such_module.part:f",
            "x: cannot import its code no_such_module.part:f: there is no module no_such_module",
        ),
        ("math:cube", "x: cannot import its code math:cube: module 'math' has no attribute 'cube'"),
    ],
)
def test_code_that_does_not_exist(code: str, told: str) -> None:
    with pytest.raises(ConfigError) as caught:
        thing("x", code=code).load()
    assert str(caught.value) == told


def test_the_engine_of_another_package_checks_the_model(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    module = ModuleType("offered_engine")
    module.problem = lambda facts: f"has {facts.heads} heads" if facts.heads != 2 else None
    module.ENGINE = EngineInfo(name="tiny", summary="", code="", check_model="offered_engine:problem")
    monkeypatch.setitem(sys.modules, "offered_engine", module)
    entry = EntryPoint("tiny", "offered_engine:ENGINE", ENGINES.group)
    monkeypatch.setattr(mechanism, "entry_points", lambda group: [entry] if group == ENGINES.group else [])
    ENGINES.reload()
    request.addfinalizer(ENGINES.reload)
    shape = '"vocab_size": 9, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1'
    problems = {}
    for heads in (2, 4):
        (tmp_path / "config.json").write_text(f'{{{shape}, "num_attention_heads": {heads}}}')
        (tmp_path / "run.yaml").write_text("actor_rollout_ref: {rollout: {name: tiny}}")
        loaded = load(tmp_path / "run.yaml", [f"actor_rollout_ref.model.path={tmp_path}"])
        problems[heads] = [p.message for p in loaded.problems if p.code == "C709"]
    assert problems[2] == []
    assert len(problems[4]) == 1 and "has 4 heads" in problems[4][0]
