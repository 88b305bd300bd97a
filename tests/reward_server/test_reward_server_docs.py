"""docs/reward-server.md is true: its settings, the shape of each answer, and its verifier."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from iiverl_reward_client.server import Settings
from iiverl_reward_client.server.registry import BUILT_IN, find_verifiers
from iiverl_reward_client.server.settings import variable_of
from iiverl_reward_client.verifiers import BadAnswerError, Submission
from iiverl_reward_client.verifiers.worker import load, run

PAGE = (Path(__file__).parents[2] / "docs" / "reward-server.md").read_text(encoding="utf-8")
EXAMPLES = [json.loads(block) for block in re.findall(r"```json\n(.*?)```", PAGE, re.DOTALL)]
CORES = ("workers", "sandbox_places")  # their defaults depend on the machine


def test_every_setting_is_listed_with_its_default() -> None:
    rows = re.findall(r"^\| `([A-Z_]+)` \| (.*?) ?\| (.*?) \|$", PAGE, re.MULTILINE)
    expected = []
    for name, field in Settings.model_fields.items():
        default = "" if field.default is None else f"`{json.dumps(field.default, ensure_ascii=False)}`"
        default = "cores, at most 4" if name in CORES else default.replace('"', "")
        expected.append((variable_of(name), default, field.description))
    assert [(name, default.strip(), text) for name, default, text in rows] == expected


def test_every_type_has_an_example() -> None:
    assert [example["type"] for example in EXAMPLES] == list(BUILT_IN)
    assert re.findall(r"^### `(\w+)`$", PAGE, re.MULTILINE) == list(BUILT_IN)


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda example: example["type"])
def test_an_example_has_the_shape_that_is_checked(example: dict[str, Any]) -> None:
    verifier = find_verifiers(Settings())[example["type"]].verifier
    verifier.check(example["answer"])
    for key in set(example["answer"]) - {"language"}:
        with pytest.raises(BadAnswerError):
            verifier.check({name: value for name, value in example["answer"].items() if name != key})


def test_the_verifier_scores(tmp_path: Path) -> None:
    source = re.search(r"```python\n(.*?)```", PAGE, re.DOTALL)
    assert source is not None
    (tmp_path / "my_verifier.py").write_text(source[1])
    function = load(f"{tmp_path / 'my_verifier.py'}:ends_with")

    def scored(response: str, answer: Any) -> dict[str, Any]:
        return run(function, Submission("ends_with", response, answer, None, {}))

    assert scored("so 42\n", "42") == {"score": 1.0, "components": {"characters": 5.0}, "info": {}}
    assert scored("so 43", "42")["score"] == 0.0
    assert scored("so 43", 42)["failed"] == "bad_request"


def test_the_fields_of_a_submission_are_listed() -> None:
    table = PAGE.partition("| field of `Submission` |")[2].partition("\n\n")[0]
    cells = [row.split("|")[1] for row in table.splitlines()[2:]]
    assert set(re.findall(r"`(\w+)`", " ".join(cells))) == set(Submission.__slots__)
