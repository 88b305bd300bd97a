"""The loop runs where neither torch nor Ray nor transformers can be imported: this file is run in such an interpreter."""

import importlib
import pkgutil
import subprocess
import sys
from typing import Any

MISSING = ("torch", "ray", "transformers")


def test_a_step_needs_neither_torch_nor_ray() -> None:
    done = subprocess.run([sys.executable, __file__], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [
        "evaluate",
        "advantages",
        "update",
        "update_rollout_weights",
        "weight_digests",
    ]


class Worker:
    """What a process that trains is asked, and small things in return."""

    def __init__(self) -> None:
        self.asked: list[str] = []

    def generate(self, requests, sampling):
        from iiverl_core.samples import Handle, Rollout, SequenceRef, TokenSequence

        for request in requests:
            sequence = SequenceRef(request.id, Handle(None), 3, 1)
            tokens = TokenSequence.untrained([1, 2, 3])
            yield [tokens], [Rollout(request.id, request.prompt, "r", "r", "stop", 0, -1.0, (sequence,))]

    def evaluate(self, role, batch):
        from iiverl_core.cluster.messages import TokenArrays
        from iiverl_core.samples import Handle

        return TokenArrays([Handle(None)] * len(batch.sequences), [0.0] * len(batch.sequences))

    def advantages(self, sequences, scores, baselines, kl_coef):
        from iiverl_core.cluster.messages import Advantages
        from iiverl_core.samples import Handle

        each = [Handle(None)] * len(sequences)
        return Advantages(each, each, [0.0] * len(scores), scores, 0.0, {})

    def update(self, role, batch, lr):
        from iiverl_core.cluster.messages import Updated
        from iiverl_core.training import StepResult

        return Updated({"actor/pg_loss": 1.0}, StepResult(1.0, True))

    def sleep(self, discard_weights): ...

    def update_rollout_weights(self, sync):
        from iiverl_core.cluster.messages import ReceivedWeights

        self.version = sync.version
        return ReceivedWeights(sync, 0, {"weight": sync.version})

    def weight_digests(self, base) -> dict[str, int]:
        return {"weight": self.version}

    def memory(self) -> dict[str, int]:
        return {"cpu_memory_used": 1}


class Group:
    """A worker group of one, in this process."""

    def __init__(self) -> None:
        from iiverl_core.cluster.messages import WorkerInfo
        from iiverl_core.cluster.store import LocalStore
        from iiverl_core.config.roles import ROLE_KEYS
        from iiverl_core.training import ParallelRank

        self.store, self.worker = LocalStore(), Worker()
        self.infos = [
            WorkerInfo(
                rank=0,
                host="host",
                pid=1,
                device="cpu",
                parallel_ranks=dict.fromkeys(ROLE_KEYS, ParallelRank(0, 1)),
                parameters={"actor": 0},
                trained_parameters={},
                layouts=dict.fromkeys(ROLE_KEYS, "packed"),
            )
        ]

    def run(self, method, arguments) -> list[Any]:
        return [self.run_on(0, method, *each) for each in arguments]

    def run_on(self, rank, method, *arguments) -> Any:
        self.worker.asked.append(method.__name__)
        return getattr(self.worker, method.__name__)(*arguments)

    def stream(self, method, arguments):
        for each in arguments:
            yield from getattr(self.worker, method.__name__)(*each)

    def close(self) -> None: ...


def one_step() -> list[str]:
    """Run one step of GRPO over such a group; give the calls that it made, without those about memory."""
    from test_controller_state import RUN, Scores, Silent, Unsaved

    from iiverl_core.cluster.engines import ColocatedEngines
    from iiverl_core.controller.collector import Plan
    from iiverl_core.controller.rollout_queue import RolloutQueue
    from iiverl_core.controller.state import TrainState
    from iiverl_core.controller.trainer import Trainer
    from iiverl_core.controller.worker_client import WorkerClient
    from iiverl_core.data import PromptOrder
    from iiverl_core.samples import Prompt
    from iiverl_core.stopping import Stop

    class DifferentScores(Scores):
        def collect(self, ids, may_fail=None):
            from iiverl_reward_client import Scored

            return {id: Scored(float(id.member)) for id in super().collect(ids, may_fail)}

    prompts: Any = [Prompt(row=row, ids=(1, 2), text="p") for row in range(4)]
    observer: Any = Silent()
    checkpoints: Any = Unsaved()
    group = Group()
    workers = WorkerClient(group, ColocatedEngines(group, 1), RUN)
    plan, state = Plan(prompts, PromptOrder(4, 4, seed=3), None, 1), TrainState(kl_coef=0.01)
    rollouts = RolloutQueue(RUN, plan, workers, DifferentScores(), observer, state)
    trainer = Trainer(RUN, plan, workers, rollouts, observer, checkpoints, state, Stop())
    rollouts.start()
    group.worker.asked.clear()
    record = trainer.step(1)
    assert len(record.batch) == 8 and record.metrics["actor/pg_loss"] == 1.0
    return [name for name in dict.fromkeys(group.worker.asked) if name not in ("sleep", "memory")]


if __name__ == "__main__":
    sys.modules.update(dict.fromkeys(MISSING))  # importing one of them raises ModuleNotFoundError
    import iiverl_core.controller

    for module in pkgutil.iter_modules(iiverl_core.controller.__path__):
        importlib.import_module(f"iiverl_core.controller.{module.name}")
    print(*one_step())
