"""Settings from the environment and from `.env`, and what they name."""

from pathlib import Path

import pytest

from iiverl_reward_client.server import Scoring, Settings, SettingsError, load_settings


def written(folder: Path, text: str) -> Path:
    path = folder / "settings.env"
    path.write_text(text, encoding="utf-8")
    return path


def test_defaults() -> None:
    settings = Settings()
    assert (settings.bind_host, settings.bind_port, settings.token) == ("127.0.0.1", 8000, None)
    assert (settings.answer_marker, settings.end_token) == ("<｜Assistant｜>", "<｜end▁of▁sentence｜>")
    assert settings.use_format_verifier is False


def test_a_file_is_read_and_the_environment_goes_first(tmp_path: Path) -> None:
    path = written(
        tmp_path,
        "# a comment\n\n"
        "USE_FORMAT_VERIFIER=true\n"
        "export FUSION_SANDBOX_URL = http://sandbox:8080  # here\n"
        "LLM_JUDGE_MODEL='a # b'\n"
        'REWARD_SERVER_ANSWER_MARKER="<|im_start|>assistant\\n" # with its line break\n'
        "LLM_JUDGE_API_KEY=\n"
        "LLM_JUDGE_MAX_TOKENS=5\n"
        "LLM_JUDGE_TEMPERATURE=0.5\n"
        "REWARD_SERVER_TOKEN=a#b\n"
        "SOMETHING_ELSE=1\n",
    )
    settings = load_settings(
        path, {"LLM_JUDGE_MAX_TOKENS": "6", "REWARD_SERVER_BIND_PORT": "9", "LLM_JUDGE_MODEL": ""}
    )
    assert settings.use_format_verifier is True
    assert settings.fusion_sandbox_url == "http://sandbox:8080"
    assert settings.llm_judge_model == "a # b"
    assert settings.answer_marker == "<|im_start|>assistant\n"
    assert settings.llm_judge_api_key is None
    assert (settings.llm_judge_max_tokens, settings.llm_judge_temperature) == (6, 0.5)
    assert settings.bind_port == 9
    assert settings.token is not None and settings.token.get_secret_value() == "a#b"


def test_the_file_of_the_working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert load_settings(environ={}).bind_port == 8000
    (tmp_path / ".env").write_text("REWARD_SERVER_BIND_PORT=7")
    assert load_settings(environ={}).bind_port == 7


def test_secrets_are_not_shown() -> None:
    settings = load_settings(environ={"REWARD_SERVER_TOKEN": "hush", "LLM_JUDGE_API_KEY": "hush"})
    assert "hush" not in f"{settings!r} {settings}"


@pytest.mark.parametrize(
    ("environ", "said"),
    [
        ({"REWARD_SERVER_BIND_PORT": "hush"}, "REWARD_SERVER_BIND_PORT: Input should be a valid integer"),
        ({"USE_FORMAT_VERIFIER": "hush"}, "USE_FORMAT_VERIFIER"),
        ({"REWARD_SERVER_WORKERS": "0"}, "REWARD_SERVER_WORKERS"),
    ],
)
def test_a_wrong_value_is_told_by_name(environ: dict[str, str], said: str) -> None:
    with pytest.raises(SettingsError) as told:
        load_settings(environ=environ)
    assert said in str(told.value)
    assert "hush" not in str(told.value)


def test_a_file_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=r"settings.env cannot be read"):
        load_settings(tmp_path / "settings.env")
    with pytest.raises(SettingsError, match="line 2: expected NAME=value"):
        load_settings(written(tmp_path, "A=1\nnonsense\n"))


@pytest.mark.parametrize(
    ("file", "said"),
    [
        ("nowhere.py:f", "does not exist"),
        ("here.py", "expected file.py:function"),
        ("here.py:", "expected file.py:function"),
        ("here.txt:f", "expected file.py:function"),
        ("here.py:math_verifiable", "there is a verifier of the type 'math_verifiable' already"),
    ],
)
def test_a_verifier_that_is_not_there(tmp_path: Path, file: str, said: str) -> None:
    (tmp_path / "here.py").write_text("")
    with pytest.raises(SettingsError, match=said):
        Scoring(Settings(), [str(tmp_path / file)])


def test_the_version_follows_what_may_change_a_score(tmp_path: Path) -> None:
    path = tmp_path / "own.py"
    path.write_text("def f(s): return 1")
    file = f"{path}:f"
    first = Scoring(Settings(), [file]).version
    assert Scoring(Settings(bind_port=9), [file]).version == first
    assert Scoring(Settings(use_format_verifier=True), [file]).version != first
    assert Scoring(Settings()).version != first
    path.write_text("def f(s): return 2")
    assert Scoring(Settings(), [file]).version != first


def test_an_installed_package_offers_a_verifier(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    info = tmp_path / "offering-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: offering\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[iiverl.verifiers]\nlength = offering.module:Length.score\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert "length" in Scoring(Settings()).types
