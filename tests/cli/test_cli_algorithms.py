"""`iiverl algorithms`: every name that a run can take, and nothing else."""

import subprocess
import sys

import pytest
from typer.testing import CliRunner, Result

from iiverl_cli import algorithms as command
from iiverl_cli.main import app
from iiverl_core.config.schema import keys


def iiverl(*arguments: str) -> Result:
    return CliRunner().invoke(app, list(arguments))


def test_every_algorithm_has_a_line_and_every_key_is_one() -> None:
    output = iiverl("algorithms").stdout
    for section in command.all_sections():
        for key in section.keys:
            assert key in keys()
            assert key in output
        for info in section.registry.values():
            assert f"  {', '.join(info.names)}  " in output
            assert info.summary in output


def test_the_list_says_how_to_name_ones_own() -> None:
    output = iiverl("algorithms").stdout
    assert "algorithm.adv_estimator: path/to/my_file.py:centred" in output
    assert "    def centred(batch, settings):\n" in output


def test_lines_end_at_a_word_where_the_terminal_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "40")
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    listed = command._listed(command.all_sections()[2]).splitlines()[1:]
    assert all(len(line) <= 40 for line in listed)
    assert listed[0] == "  token-mean               sum of all…"


def test_a_name_gives_the_whole_docstring_of_its_file() -> None:
    result = iiverl("algorithms", "grpo")
    assert result.exit_code == 0
    assert result.stdout.startswith("algorithm.adv_estimator: grpo\n")
    assert "arXiv:2402.03300" in result.stdout
    assert "A group of one has nothing to be compared with" in result.stdout


@pytest.mark.parametrize("name", ["k3", "k3+", "low_var_kl"])
def test_a_kind_of_kl_is_explained_by_the_file_of_all(name: str) -> None:
    output = iiverl("algorithms", name).stdout
    assert output.startswith(
        f"actor_rollout_ref.actor.kl_loss_type: {name} or algorithm.kl_penalty: {name}\n"
    )
    assert "Schulman" in output


@pytest.mark.parametrize(
    ("name", "told"), [("grop", "; did you mean grpo?"), ("grpo+", "; did you mean grpo?"), ("zzz", ".")]
)
def test_a_name_that_is_none(name: str, told: str) -> None:
    result = iiverl("algorithms", name)
    assert result.exit_code == 2
    assert result.stdout == ""
    assert result.stderr == f"error: there is no algorithm '{name}'{told} All of them: iiverl algorithms\n"


@pytest.mark.parametrize("arguments", [["algorithms"], ["algorithms", "grpo"]])
def test_it_imports_nothing_heavy(arguments: list[str]) -> None:
    program = (
        "import sys, atexit\n"
        "heavy = ['torch', 'numpy', 'iiverl_core.algorithms']\n"
        "atexit.register(lambda: print([m for m in heavy if m in sys.modules]))\n"
        f"sys.argv = ['iiverl', *{arguments}]\n"
        "from iiverl_cli.main import main; main()"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"
