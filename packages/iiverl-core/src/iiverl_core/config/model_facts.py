"""What a model's `config.json` tells of its shape, read without the libraries that would build the model.

`iiverl validate` judges layouts by it, and `iiverl plan` counts memory by it.
"""

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

CONFIG_FILE = "config.json"
QKV_BIASED = ("qwen2", "qwen2_moe")
"""Model types whose query, key and value projections always have a bias, and whose files have no key for it."""
QK_NORMED = ("qwen3", "qwen3_moe")
HEAD_DIM = {"qwen3": 128}
"""Size of a head where a file names none and it is not the hidden size over the heads."""


@dataclass(frozen=True)
class ModelFacts:
    """The shape of a causal language model with gated MLPs, as Llama, Qwen2, Qwen3 and Qwen3-MoE have.

    Of a model that also sees or hears, this is the part that writes. `expert_layers` are the layers, counted from 0,
    whose MLP is a choice of `experts_per_token` out of `experts`, each of inner size `expert_size`. `positions` is how
    rotary positions are scaled, in transformers' words (`rope_type`).
    """

    model_type: str
    vocabulary: int
    hidden_size: int
    intermediate_size: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    tied_embeddings: bool = False
    qkv_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    activation: str = "silu"
    positions: str = "default"
    sliding_window: bool = False
    experts: int = 0
    experts_per_token: int = 0
    expert_size: int = 0
    expert_layers: tuple[int, ...] = ()

    @property
    def query_size(self) -> int:
        """Width of all query heads together."""
        return self.heads * self.head_dim

    @property
    def kv_size(self) -> int:
        """Width of all key heads together, or of all value heads."""
        return self.kv_heads * self.head_dim

    @property
    def parameters(self) -> int:
        """Parameters of the whole model, exact for the four families."""
        experts = len(self.expert_layers)
        return (
            self.embedding_parameters * (1 if self.tied_embeddings else 2)
            + self.layers * (self.attention_parameters + self.norm_parameters)
            + (self.layers - experts) * self.mlp_parameters
            + experts * (self.router_parameters + self.experts * self.expert_parameters)
            + self.hidden_size
        )

    @property
    def active_parameters(self) -> int:
        """Parameters that one token goes through, of all experts only those that are chosen."""
        idle = self.experts - self.experts_per_token
        return self.parameters - len(self.expert_layers) * idle * self.expert_parameters

    @property
    def embedding_parameters(self) -> int:
        """Parameters of the embedding, and of the head where that is not the same."""
        return self.vocabulary * self.hidden_size

    @property
    def attention_parameters(self) -> int:
        """Parameters of one layer's projections, biases included."""
        weights = self.hidden_size * (2 * self.query_size + 2 * self.kv_size)
        biases = self.qkv_bias * (self.query_size + 2 * self.kv_size) + self.output_bias * self.hidden_size
        return weights + biases

    @property
    def norm_parameters(self) -> int:
        """Parameters of one layer's norms."""
        return 2 * self.hidden_size + self.qk_norm * 2 * self.head_dim

    @property
    def mlp_parameters(self) -> int:
        """Parameters of one dense layer's MLP: gate, up and down."""
        biases = self.mlp_bias * (2 * self.intermediate_size + self.hidden_size)
        return 3 * self.hidden_size * self.intermediate_size + biases

    @property
    def router_parameters(self) -> int:
        """Parameters of one layer's choice between experts."""
        return self.hidden_size * self.experts

    @property
    def expert_parameters(self) -> int:
        """Parameters of one expert."""
        return 3 * self.hidden_size * self.expert_size


def read_model_facts(path: str, override: Mapping[str, Any] | None = None) -> ModelFacts | None:
    """Read the shape of the model at `path`, a folder or a Hub name that is in the local cache.

    `override` replaces values of the file (`override_config`). None where there is no such file, or where it names the
    parts of a model otherwise, as those of older architectures do.
    """
    file = find_config(path)
    if file is None:
        return None
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
        values = {**values, **(override or {})}
        return facts_from({**values, **(values.get("text_config") or {})})
    except (OSError, ValueError, KeyError, TypeError, AttributeError, ZeroDivisionError):
        return None  # whoever builds the model says what is wrong with the file


def find_config(path: str) -> Path | None:
    """Find the `config.json` of a model: in its folder, or else in the Hub's local cache."""
    folder = Path(path).expanduser()
    try:
        if folder.is_dir():
            return folder / CONFIG_FILE if (folder / CONFIG_FILE).is_file() else None
        return _cached(path)
    except (OSError, ValueError):  # a name that the system cannot even look up
        return None


def _cached(name: str) -> Path | None:
    """Find the file in the Hub's cache by the layout of its folders, since importing its library takes a while."""
    home = os.environ.get("HF_HOME") or Path(
        os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "huggingface"
    )
    cache = Path(os.environ.get("HF_HUB_CACHE") or Path(home, "hub")).expanduser()
    model = cache / f"models--{name.replace('/', '--')}"
    main = model / "refs" / "main"
    if not main.is_file():
        return None
    file = model / "snapshots" / main.read_text(encoding="utf-8").strip() / CONFIG_FILE
    return file if file.is_file() else None


def facts_from(values: Mapping[str, Any]) -> ModelFacts:
    """Read a model's shape from the keys and values of its `config.json`.

    Raises:
        KeyError, TypeError, AttributeError, ZeroDivisionError: parts are named otherwise, or values are of other kinds.
    """
    kind = values.get("model_type", "")
    hidden, heads, layers = values["hidden_size"], values["num_attention_heads"], values["num_hidden_layers"]
    intermediate = values["intermediate_size"]
    biased = bool(values.get("attention_bias", False)) and kind not in QKV_BIASED  # which read no such key
    rope = values.get("rope_scaling") or values.get("rope_parameters") or {}
    experts = values.get("num_experts") or values.get("num_local_experts") or 0
    return ModelFacts(
        model_type=kind,
        vocabulary=values["vocab_size"],
        hidden_size=hidden,
        intermediate_size=intermediate,
        layers=layers,
        heads=heads,
        kv_heads=values.get("num_key_value_heads") or heads,
        head_dim=values.get("head_dim") or HEAD_DIM.get(kind) or hidden // heads,
        tied_embeddings=bool(values.get("tie_word_embeddings", False)),
        qkv_bias=biased or kind in QKV_BIASED,
        output_bias=biased,
        mlp_bias=bool(values.get("mlp_bias", False)),
        qk_norm=kind in QK_NORMED,
        activation=values.get("hidden_act", "silu"),
        positions=rope.get("rope_type") or rope.get("type") or "default",
        sliding_window=bool(values.get("use_sliding_window", False)),
        experts=experts,
        experts_per_token=values.get("num_experts_per_tok", 0) if experts else 0,
        expert_size=(values.get("moe_intermediate_size") or intermediate) if experts else 0,
        expert_layers=_expert_layers(values, layers) if experts else (),
    )


def _expert_layers(values: Mapping[str, Any], layers: int) -> tuple[int, ...]:
    """Say which layers choose between experts: every `decoder_sparse_step`-th, but those of `mlp_only_layers`."""
    step, dense = values.get("decoder_sparse_step") or 1, values.get("mlp_only_layers") or ()
    return tuple(layer for layer in range(layers) if (layer + 1) % step == 0 and layer not in dense)
