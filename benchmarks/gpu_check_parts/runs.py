"""Whether whole runs learn, resume, replay and survive: tasks of the examples on this device, by the command line."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterable
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from learning import QUICKSTART, ends, overrides
from survival import find_workers

from gpu_check_parts.demonstrations import demonstrate
from gpu_check_parts.setting import NotPossibleError, Numbers, Setting, inputs_of
from iiverl_core.registry import BACKENDS

EXAMPLES = QUICKSTART.parent
STEPS = 40
SAVED_STEP = 6
REPLAYED_STEP = 4
LEAST_RATIO = 2.0  # of the mean reward of the last steps to that of the first
COMMAND = (
    "from iiverl_cli.main import main; main()"  # works where the packages lie on the path without a script
)
DETERMINISTIC = "trainer.deterministic=true"
MODEL = "actor_rollout_ref.model"
LORA = (
    f"{MODEL}.lora_rank=16",
    f"{MODEL}.lora_alpha=32",
    "actor_rollout_ref.actor.optim.lr=4.0e-3",
    "actor_rollout_ref.actor.checkpoint.save_contents=[model]",
)
TASKS: dict[str, tuple[str, str, int, tuple[str, ...]]] = {
    "vision": (
        "name_the_colour",
        "parquet",
        50,
        ("custom_reward_function.path={example}/reward.py",),
    ),
    "turns": (
        "guess_the_number",
        "jsonl",
        30,
        ("actor_rollout_ref.rollout.multi_turn.environment.path={example}/environment.py",),
    ),
}
"""Other examples to learn: folder, ending of the data's files, steps, and overrides."""


def learn(
    setting: Setting,
    *,
    algorithm: str,
    backend: str = "fsdp",
    runtime: str = "local",
    engine: str = "hf",
    lora: bool = False,
) -> Numbers:
    """Train for some steps by an algorithm of `learning.py`; the reward must rise."""
    for module in {"ray": ["ray"], "local": []}[runtime] + {"vllm": ["vllm"], "hf": []}[engine]:
        _require(module)
    if missing := BACKENDS[backend].missing():
        raise NotPossibleError(missing)
    more = [
        f"trainer.runtime={runtime}",
        f"actor_rollout_ref.actor.strategy={backend}",
        "actor_rollout_ref.actor.megatron.tensor_model_parallel_size=1",
        f"actor_rollout_ref.rollout.name={engine}",
        "actor_rollout_ref.rollout.tensor_model_parallel_size=1",
        *(LORA if lora else ()),
    ]
    with TemporaryDirectory() as temporary:
        inputs = _make_inputs(QUICKSTART, Path(temporary))
        if lora:
            demonstrate(inputs, setting.device)
        return _rise(setting, inputs, STEPS, [*_quickstart(algorithm, inputs, inputs / "run", STEPS), *more])


def learn_example(setting: Setting, *, task: str) -> Numbers:
    """Train for some steps on another example's task; the reward must rise."""
    name, ending, steps, more = TASKS[task]
    example = EXAMPLES / name
    with TemporaryDirectory() as temporary:
        inputs = _make_inputs(example, Path(temporary))
        options = [
            example / f"{name}.yaml",
            f"data.train_files={inputs}/train.{ending}",
            "data.val_files=null",
            f"{MODEL}.path={inputs}/model",
            "trainer.runtime=local",
            "trainer.n_gpus_per_node=1",
            "trainer.save_freq=-1",
            "trainer.val_before_train=false",
            "trainer.test_freq=-1",
            "trainer.logger=[jsonl]",
            "trainer.rollout_data_dir=null",
            f"trainer.total_training_steps={steps}",
            f"trainer.default_local_dir={inputs}/run",
            *(each.format(example=example) for each in more),
        ]
        return _rise(setting, inputs, steps, options)


def resume(setting: Setting) -> Numbers:
    """Resume a run from the checkpoint in its middle, deterministically; the metrics must be those of the whole run."""
    more = [DETERMINISTIC, f"trainer.save_freq={SAVED_STEP}", "trainer.max_actor_ckpt_to_keep=2"]
    with TemporaryDirectory() as temporary:
        inputs = _make_inputs(QUICKSTART, Path(temporary))
        whole, resumed = inputs / "whole", inputs / "resumed"
        _train(setting, [*_quickstart("GRPO", inputs, whole, 2 * SAVED_STEP), *more])
        checkpoint = whole / f"global_step_{SAVED_STEP}"
        more += ["trainer.resume_mode=resume_path", f"trainer.resume_from_path={checkpoint}"]
        _train(setting, [*_quickstart("GRPO", inputs, resumed, 2 * SAVED_STEP), *more])
        return {"resumed steps with equal metrics": _equal_steps(whole, resumed)}


def replay(setting: Setting) -> Numbers:
    """Compute a recorded step again, without an engine; its metrics must be those of the run."""
    with TemporaryDirectory() as temporary:
        inputs = _make_inputs(QUICKSTART, Path(temporary))
        run = inputs / "run"
        options = [
            *_quickstart("PPO + GAE", inputs, run, REPLAYED_STEP),
            DETERMINISTIC,
            f"trainer.save_freq={REPLAYED_STEP // 2}",
            "trainer.max_actor_ckpt_to_keep=null",
            "trainer.max_critic_ckpt_to_keep=null",
            f"trainer.rollout_data_dir={run}/samples",
        ]
        _train(setting, options)
        started = time.perf_counter()
        _iiverl("replay", run, "--step", REPLAYED_STEP, "--output", inputs / "again")
        seconds = time.perf_counter() - started
        lines = (inputs / "again" / "metrics.jsonl").read_text().splitlines()
        return {"replayed steps with equal metrics": len(lines), "replay s": seconds}


def survive(setting: Setting) -> Numbers:
    """Kill the worker of a run under Ray; the run must go on by itself, and end with the metrics of one left alone."""
    _require("ray")
    more = [DETERMINISTIC, f"trainer.save_freq={SAVED_STEP // 2}"]
    with TemporaryDirectory() as temporary:
        inputs = _make_inputs(QUICKSTART, Path(temporary))
        whole, killed = inputs / "whole", inputs / "killed"
        _train(setting, [*_quickstart("GRPO", inputs, whole, 2 * SAVED_STEP), *more])
        options = [*_quickstart("GRPO", inputs, killed, 2 * SAVED_STEP), *more, "trainer.runtime=ray"]
        metrics = killed / "metrics.jsonl"
        with (inputs / "log").open("w+") as log:
            run = _start(setting, options, log)
            while run.poll() is None and not (metrics.exists() and len(_results(killed)) >= SAVED_STEP):
                time.sleep(0.05)
            workers = find_workers(run)[1] if run.poll() is None else []
            for worker in workers[:1]:
                worker.kill()
            started = time.perf_counter()
            code = run.wait()
            seconds = time.perf_counter() - started
            log.seek(0)
            _refuse_failure(code, log.read())
        if not workers:
            raise RuntimeError("the run ended before its worker could be killed")
        return {"steps with equal metrics": _equal_steps(whole, killed), "from kill to end s": seconds}


def _require(module: str) -> None:
    if find_spec(module) is None:
        raise NotPossibleError(f"{module} is not installed")


def _rise(setting: Setting, inputs: Path, steps: int, options: Iterable[Any]) -> Numbers:
    """Train into `run` beside the inputs, and compare the rewards of the first and the last steps."""
    started = time.perf_counter()
    _train(setting, options)
    seconds = time.perf_counter() - started
    first, last = ends(inputs / "run")
    if not last > LEAST_RATIO * first:
        raise ValueError(f"the reward did not rise: {first:.3f} at first, {last:.3f} after {steps} steps")
    return {"reward at first": first, "reward at last": last, "run s": seconds}


def _equal_steps(whole: Path, other: Path) -> int:
    """Count the steps of another run, whose metrics must be those of the whole one."""
    expected, found = (_results(folder) for folder in (whole, other))
    different = [
        f"{name} of step {step}"
        for step, metrics in found.items()
        for name, value in metrics.items()
        if expected[step].get(name) != value
    ]
    if different or not found:
        raise ValueError(f"the other run differs: {', '.join(different[:5]) or 'it has no steps'}")
    return len(found)


def _results(folder: Path) -> dict[int, dict[str, float]]:
    """Read the metrics of each step that depend on neither time nor memory."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    prefixes = ("actor/", "critic/", "response_length/", "rollout/")
    return {
        line["step"]: {name: line[name] for name in line if name.startswith(prefixes)}
        for line in lines
        if line["step"] > 0
    }


def _make_inputs(example: Path, folder: Path) -> Path:
    """Make an example's data and model."""
    inputs = inputs_of(example)
    inputs.make_data(folder)
    inputs.make_model(folder / "model")
    return folder


def _quickstart(algorithm: str, inputs: Path, folder: Path, steps: int) -> list[Any]:
    return [QUICKSTART / "quickstart.yaml", *overrides(algorithm, inputs, folder, 1, steps)]


def _train(setting: Setting, options: Iterable[Any]) -> None:
    _iiverl("train-ppo", *options, f"trainer.device={setting.device.type}")


def _start(setting: Setting, options: Iterable[Any], log: Any) -> "subprocess.Popen[bytes]":
    command = [sys.executable, "-c", COMMAND, "train-ppo", *options, f"trainer.device={setting.device.type}"]
    return subprocess.Popen([*map(str, command)], env=_environment(), stdout=log, stderr=subprocess.STDOUT)


def _iiverl(*arguments: Any) -> None:
    """Run a command of iiverl.

    Raises:
        RuntimeError: it failed.
    """
    command = [sys.executable, "-c", COMMAND, *arguments]
    done = subprocess.run([*map(str, command)], env=_environment(), capture_output=True, text=True)
    _refuse_failure(done.returncode, done.stdout + done.stderr)


def _refuse_failure(code: int, output: str) -> None:
    if code:
        sys.stderr.write(output)
        last = output.strip().splitlines()[-1:]
        raise RuntimeError(f"the run ended with {code}: {' '.join(last)}")


def _environment() -> dict[str, str]:
    return {"OMP_NUM_THREADS": "1", **os.environ}
