"""The documentation's links, commands and YAML are checked by what reads them: the parser of each command, the loader."""

import ast
import json
import re
import shlex
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import click
import pytest
import typer
import yaml

from iiverl_cli.main import app
from iiverl_core.config import load
from iiverl_core.config.diagnostics import DIAGNOSTICS
from iiverl_core.config.loading import load_text
from quickstart_fixtures import load_script

ROOT = Path(__file__).parents[2]
STAGE = load_script(ROOT / "scripts" / "stage_docs.py")
PAGES = {str(page.relative_to(ROOT)): page for page in STAGE.pages()}
NOT_ALONE = re.compile(r"C0(0\d|1[0-8])|C03[123]")
"""Codes of problems that a part of a configuration cannot have: of its text, its keys, its values, and unused keys."""


class Block(NamedTuple):
    language: str
    text: str


def blocks(page: str) -> list[Block]:
    """The fenced blocks of a page, without indentation."""
    found = re.findall(r"^([ ]*)```(\w*)\n(.*?)^\1```", PAGES[page].read_text(), re.DOTALL | re.MULTILINE)
    return [Block(language, re.sub(rf"^{indent}", "", text, flags=re.M)) for indent, language, text in found]


def commands(page: str) -> Iterator[list[str]]:
    """The words of every command in blocks of bash, with the variables that the page sets."""
    variables: dict[str, str] = {}
    for block in blocks(page):
        if block.language != "bash":
            continue
        for line in whole_lines(re.sub(r"\\\n\s*", " ", block.text)):
            for name, value in variables.items():
                line = re.sub(rf"\${name}\b", value, line)
            lexer = shlex.shlex(line, posix=True, punctuation_chars=";&|<>")
            lexer.whitespace_split, lexer.commenters = True, "#"
            words = list(lexer)
            while words:
                end = next((i for i, word in enumerate(words) if set(word) <= set(";&|<>")), len(words))
                command, words = words[:end], words[end + 1 :]
                while command and (variable := re.fullmatch(r"(\w+)=(.*)", command[0], re.DOTALL)):
                    variables[variable[1]] = variable[2]
                    del command[0]
                if command:
                    yield command


def whole_lines(text: str) -> Iterator[str]:
    """The lines of a script; those within quotes are one."""
    line = ""
    for part in text.splitlines():
        line = f"{line}\n{part}" if line else part
        try:
            shlex.split(line, comments=True)
        except ValueError:
            continue
        yield line
        line = ""
    assert not line, "a quote is not closed"


def targets(text: str) -> set[str]:
    """The anchors of a page, as forges and the site make them from headings."""
    headings = re.findall(r"^#+ (.*)$", re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.M), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page: str) -> None:
    text = PAGES[page].read_text()
    broken = []
    for link, path in STAGE.links(text):
        target = (PAGES[page].parent / path).resolve() if path else PAGES[page]
        anchor = re.search(r"#([^)\s]*)\)$", link)
        target = target / "README.md" if (target / "README.md").exists() else target
        if not target.exists() or (anchor and anchor[1] not in targets(target.read_text())):
            broken.append(link)
    assert not broken


def test_the_site_is_built_without_warnings(tmp_path: Path) -> None:
    """`make docs`, which also finds links and anchors that lead nowhere."""
    subprocess.run([sys.executable, "scripts/stage_docs.py", tmp_path / "docs"], cwd=ROOT, check=True)
    config = (ROOT / "zensical.toml").read_text().replace("build/", "")
    (tmp_path / "zensical.toml").write_text(config)
    zensical = Path(sys.executable).with_name("zensical")
    done = subprocess.run(
        [zensical, "build", "--clean", "--strict"], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert (tmp_path / "site" / "docs" / "getting-started" / "index.html").exists()


def test_every_page_is_in_the_navigation() -> None:
    pages = re.findall(r'= "([^"]+\.md)"', (ROOT / "zensical.toml").read_text())
    assert sorted(pages) == sorted(PAGES)


@pytest.mark.parametrize("page", PAGES)
def test_commands_are_understood(page: str) -> None:
    for command in commands(page):
        assert "$" not in command[0], command
        match command[0].rpartition("/")[2]:
            case "iiverl":
                parse(command[1:])
            case "make":
                assert re.search(rf"^{command[1]}:", (ROOT / "Makefile").read_text(), re.M), command
            case "pip":
                extras = re.findall(r"iiverl\[([\w,-]+)\]", " ".join(command))
                known = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"][
                    "optional-dependencies"
                ]
                assert all(extra in known for group in extras for extra in group.split(",")), command
            case "python" | "python3":
                script = next((word for word in command[1:] if word.endswith(".py")), None)
                if script and script.startswith(("examples/", "benchmarks/", "scripts/", "tests/")):
                    assert (ROOT / script).exists(), command
            case "pytest":
                assert all((ROOT / word).exists() for word in command[1:] if "/" in word), command


def parse(words: list[str]) -> None:
    """Parse a command line of iiverl as far as to its function, and its overrides of keys."""
    command: click.Command = typer.main.get_command(app)
    context = click.Context(command)
    if words[0] == "reward-server" or words[0].startswith("-"):
        return
    while isinstance(command, click.Group):
        known = command.get_command(context, words[0])
        assert known is not None, f"there is no command {words}"
        command, words = known, words[1:]
    if "-h" in words or "--help" in words or words[:1] == ["…"]:
        return
    command.make_context(command.name or "", list(words), resilient_parsing=False)
    overrides = [word for word in words if re.match(r"[a-z_]+\.[\w.]+=", word)]
    assert not load(None, overrides).unknown_keys if overrides else True, overrides


@pytest.mark.parametrize("page", PAGES)
def test_configurations_load(page: str) -> None:
    for block in blocks(page):
        if block.language != "yaml":
            continue
        values = yaml.safe_load(block.text)
        if isinstance(values, dict) and values.keys() <= {"data", "trainer", "algorithm", "actor_rollout_ref", "critic",
                                                          "reward_model", "reward_api", "custom_reward_function",
                                                          "global_profiler", "ray_kwargs"}:  # fmt: skip
            loaded = load_text(block.text, page)
            assert not [problem for problem in loaded.problems if NOT_ALONE.match(problem.code)]


def test_recipes_work_on_the_run_of_the_readme(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each block of the cookbook, merged into the README's configuration, is a valid one without warnings."""
    monkeypatch.chdir(tmp_path)
    base = next(
        yaml.safe_load(b.text) for b in blocks("README.md") if b.language == "yaml" and "data:" in b.text
    )
    base["data"]["train_files"] = "train.jsonl"
    row = '{"prompt": "1+1?", "data_source": "openai/gsm8k", "ground_truth": "2"}\n'
    (tmp_path / "train.jsonl").write_text(2048 * row)
    (tmp_path / "reward.py").write_text("def compute_score(solution_str, **kwargs):\n    return 1.0\n")
    recipes = [yaml.safe_load(block.text) for block in blocks("docs/cookbook.md") if block.language == "yaml"]
    assert len(recipes) > 10
    for recipe in recipes:
        loaded = load_text(yaml.safe_dump(merged(base, recipe)), "recipe.yaml")
        wrong = [p for p in loaded.problems if p.severity in ("error", "input", "warning")]
        assert not wrong, (recipe, wrong)


def merged(base: dict, changes: dict) -> dict:
    both = dict(base)
    for key, value in changes.items():
        both[key] = merged(base.get(key, {}), value) if isinstance(value, dict) else value
    return both


@pytest.mark.parametrize("page", PAGES)
def test_other_blocks_can_be_read(page: str) -> None:
    for block in blocks(page):
        if block.language == "python":
            ast.parse(block.text)
        elif block.language == "json":
            for line in block.text.splitlines() if not block.text.startswith("{\n") else [block.text]:
                json.loads(line)
        elif block.language == "toml":
            tomllib.loads(block.text)


def test_troubleshooting_has_the_group_of_every_code() -> None:
    groups = re.findall(r"^\| C(\d)xx \|", (ROOT / "docs/troubleshooting.md").read_text(), re.M)
    assert groups == sorted({code[1] for code in DIAGNOSTICS})
