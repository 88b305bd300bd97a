"""Fixtures that every part of the tests may use: a tokenizer and a model small enough to be made on the spot."""

import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any
from unittest import mock

import pytest
from hypothesis import settings

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

    from data.hub_server import HubServer
    from ranks import Ranks

pytest_plugins = ("quickstart_fixtures",)

# The first example of a test may import torch; how long an example takes says nothing here.
settings.register_profile("iiverl", deadline=None)
settings.load_profile("iiverl")


def pytest_configure() -> None:
    """Let processes that tests start be interrupted, even if this one is in the background or below `nohup`."""
    for number, handler in (
        (signal.SIGINT, signal.default_int_handler),
        (signal.SIGHUP, signal.SIG_DFL),
    ):
        if signal.getsignal(number) is signal.SIG_IGN:
            signal.signal(number, handler)


CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


PAD, START, END = 256, 257, 258


def byte_tokenizer() -> "PreTrainedTokenizerFast":
    """One token a byte, ids 0 to 255, then <|pad|>, <|im_start|> and the end of sentence <|im_end|>."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocab = {piece: i for i, piece in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|pad|>", "<|im_start|>", "<|im_end|>"])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<|pad|>",
        eos_token="<|im_end|>",
        chat_template=CHAT_TEMPLATE,
        model_max_length=512,
        padding_side="left",
    )


@pytest.fixture(scope="session")
def tiny_tokenizer() -> "PreTrainedTokenizerFast":
    """A byte-level tokenizer with a chat template; 259 ids, nothing downloaded."""
    return byte_tokenizer()


@pytest.fixture(scope="session")
def tiny_model_path(
    tiny_tokenizer: "PreTrainedTokenizerFast", tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A folder with a random two-layer Qwen2 causal LM (fp32, 320 ids, always the same) and its tokenizer."""
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.set_num_threads(1)
    config = Qwen2Config(
        vocab_size=320,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        eos_token_id=END,
        pad_token_id=PAD,
        bos_token_id=None,
        dtype="float32",
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = Qwen2ForCausalLM(config)
    path = tmp_path_factory.mktemp("tiny-model")
    model.save_pretrained(path)
    tiny_tokenizer.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def hub() -> Iterator["HubServer"]:
    """An empty Hugging Face Hub on loopback: `add` datasets, and load them in a process with its `environment`."""
    from data.hub_server import HubServer

    with HubServer() as server:
        yield server


@pytest.fixture(scope="session")
def preloaded_workers() -> Iterator[Callable[..., str]]:
    """Give an interpreter for Ray's workers in which modules are imported already; see `preloaded_workers.py`."""
    program = Path(__file__).with_name("preloaded_workers.py")
    servers: dict[tuple[str, ...], tuple[subprocess.Popen, Path]] = {}

    with TemporaryDirectory() as folder:  # whose name is short enough for a socket

        def get(*modules: str) -> str:
            if modules not in servers:
                address = Path(folder) / str(len(servers))
                command = [sys.executable, program, "serve", address, *modules]
                servers[modules] = subprocess.Popen(command, stdin=subprocess.PIPE), address
            server, address = servers[modules]
            while not address.exists():
                assert server.poll() is None
                time.sleep(0.1)
            return f"{sys.executable} -S {program} start {address}"

        yield get
        for server, _ in servers.values():
            server.communicate()


@pytest.fixture(scope="module")
def ray_is_up(preloaded_workers: Callable[..., str], request: pytest.FixtureRequest) -> Iterator[None]:
    """Ray with five CPUs for all tests of a file: groups use it and leave it running."""
    import ray

    from iiverl_core.cluster.ray_connection import start_ray, stop_ray

    modules = ["iiverl_core.cluster.worker", "iiverl_core.cluster.rollout_worker", "iiverl_fsdp.backend"]
    here = [each for each in request.session.items if each.path == request.path]
    if find_spec("vllm") and any(each.get_closest_marker("vllm") for each in here):
        modules.append("iiverl_core.rollout.vllm.worker")
    init, interpreter = ray.init, preloaded_workers(*modules)

    def init_preloaded(runtime_env: dict | None, **options: Any) -> Any:
        return init(runtime_env={**(runtime_env or {}), "py_executable": interpreter}, **options)

    with mock.patch.object(ray, "init", init_preloaded):
        start_ray(cpus=5)
    yield
    stop_ray()


@pytest.fixture(scope="module")
def one_rank(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """This process as a group of one."""
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    meeting = (tmp_path_factory.mktemp("group") / "meeting").as_uri()
    dist.init_process_group("gloo", init_method=meeting, rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> "Iterator[Callable[..., Ranks]]":
    """Give a group of `size` processes that have imported `modules`; it ends with the test's module.

    Idle, its gloo threads still wake hundreds of times per second, which would slow the tests of other modules.
    """
    from ranks import Ranks

    groups: dict[tuple[int, tuple[str, ...]], Ranks] = {}

    def get(size: int, *modules: str) -> Ranks:
        key = size, modules
        if key not in groups:
            groups[key] = Ranks(size, tmp_path_factory.mktemp("ranks"), modules)
        return groups[key]

    yield get
    for group in groups.values():
        group.close()
