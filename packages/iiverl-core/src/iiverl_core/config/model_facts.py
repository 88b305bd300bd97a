"""The shape of a model, read from its `config.json` without the libraries that would build the model.

`iiverl validate` checks layouts against it, and `iiverl plan` counts memory from it.
"""

import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

ROPE_THETA, ROPE_SCALING, ROPE_PARAMETERS = "rope_theta", "rope_scaling", "rope_parameters"
CONFIG_FILE = "config.json"
QKV_BIASED = ("qwen2", "qwen2_moe", "qwen2_vl", "qwen2_vl_text", "qwen2_5_vl", "qwen2_5_vl_text")
"""Model types whose query, key and value projections always have a bias, without a key for it."""
QK_NORMED = ("qwen3", "qwen3_moe", "qwen3_vl", "qwen3_vl_text")
VISION_LANGUAGE = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "internvl")
"""Model types that are trained with images."""
HEAD_DIM = {"qwen3": 128, "qwen3_vl": 128, "qwen3_vl_text": 128}
"""Default head size by model type, if that is not the hidden size divided by the heads."""


@dataclass(frozen=True)
class ModelFacts:
    """The shape of a causal language model with gated MLPs, as Llama, Qwen2, Qwen3 and Qwen3-MoE have.

    For a multimodal model, this is its language model; one that is trained with images has `vision_parameters` beside it.
    `expert_layers` are the layers (0-based) with a mixture of `experts`,
    each of inner size `expert_size`, of which `experts_per_token` are active. `positions` is the scaling of rotary positions
    (`rope_type` in transformers).
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
    vision_parameters: int = 0

    @property
    def query_size(self) -> int:
        """Width of all query heads together."""
        return self.heads * self.head_dim

    @property
    def kv_size(self) -> int:
        """Width of all key heads together, or of all value heads."""
        return self.kv_heads * self.head_dim

    @property
    def split_shape(self) -> dict[str, int]:
        """The arguments of `splits` for the layers of this model; experts are never split."""
        inner = self.intermediate_size if len(self.expert_layers) < self.layers else 0
        return {"heads": self.heads, "kv_heads": self.kv_heads, "inner": inner}

    @property
    def parameters(self) -> int:
        """Parameters of the whole model, exact for the four families, and for theirs with images."""
        experts = len(self.expert_layers)
        return (
            self.embedding_parameters * (1 if self.tied_embeddings else 2)
            + self.layers * (self.attention_parameters + self.norm_parameters)
            + (self.layers - experts) * self.mlp_parameters
            + experts * (self.router_parameters + self.experts * self.expert_parameters)
            + self.hidden_size
            + self.vision_parameters
        )

    @property
    def active_parameters(self) -> int:
        """Parameters that are active for one token, with only `experts_per_token` of the experts."""
        idle = self.experts - self.experts_per_token
        return self.parameters - len(self.expert_layers) * idle * self.expert_parameters

    @property
    def embedding_parameters(self) -> int:
        """Parameters of the embedding; those of the output head if it is not tied."""
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
    def linear_layers(self) -> Mapping[str, tuple[int, int]]:
        """Inputs and outputs of each linear layer by its name in transformers, without head, routers and experts."""
        hidden, inner = self.hidden_size, self.intermediate_size
        attention = {
            "q_proj": (hidden, self.query_size),
            "k_proj": (hidden, self.kv_size),
            "v_proj": (hidden, self.kv_size),
            "o_proj": (self.query_size, hidden),
        }
        mlp = {"gate_proj": (hidden, inner), "up_proj": (hidden, inner), "down_proj": (inner, hidden)}
        layers: dict[str, tuple[int, int]] = {}
        for i in range(self.layers):
            layers |= {f"model.layers.{i}.self_attn.{name}": size for name, size in attention.items()}
            if i not in self.expert_layers:
                layers |= {f"model.layers.{i}.mlp.{name}": size for name, size in mlp.items()}
        return layers

    @property
    def router_parameters(self) -> int:
        """Parameters of the router of one layer."""
        return self.hidden_size * self.experts

    @property
    def expert_parameters(self) -> int:
        """Parameters of one expert."""
        return 3 * self.hidden_size * self.expert_size


def read_model_facts(path: str, override: Mapping[str, Any] | None = None) -> ModelFacts | None:
    """Read the shape of the model at `path`, a folder or a Hub name that is in the local cache.

    `override` replaces values of the file (`override_config`). Returns None if there is no such file, or if it uses other
    names, as those of older architectures do.
    """
    file = find_config(path)
    if file is None:
        return None
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
        values = {**values, **(override or {})}
        facts = facts_from({**values, **(values.get("text_config") or {})})
        tower = values.get("vision_config")
        if values.get("model_type") not in VISION_LANGUAGE or not tower:
            return facts
        if values["model_type"] == "internvl":
            count = _tiled_tower_parameters(tower, values.get("downsample_ratio", 0.5), facts.hidden_size)
        else:
            count = _tower_parameters(values["model_type"], tower, facts.hidden_size)
        return replace(facts, vision_parameters=count)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, ZeroDivisionError):
        return None  # the code that builds the model reports what is wrong


def reads_images(path: str) -> bool:
    """Return whether the model at `path` is trained with images; False if its `config.json` is not on this machine."""
    file = find_config(path)
    if file is None:
        return False
    try:
        return json.loads(file.read_text(encoding="utf-8")).get("model_type") in VISION_LANGUAGE
    except (OSError, ValueError, AttributeError):
        return False


def _tower_parameters(family: str, tower: Mapping[str, Any], hidden_size: int) -> int:
    """Count the parameters of a vision tower: patch embedding, blocks, and what merges patches for the language model."""
    width = tower.get("embed_dim", 1280) if family == "qwen2_vl" else tower["hidden_size"]
    patch = tower.get("in_channels", 3) * tower.get("temporal_patch_size", 2) * tower["patch_size"] ** 2
    merged = width * tower.get("spatial_merge_size", 2) ** 2
    out = hidden_size if family == "qwen2_vl" else tower["out_hidden_size"]
    merger = merged * merged + merged + merged * out + out
    attention = 4 * width * width + 4 * width
    if family == "qwen2_5_vl":
        inner = tower["intermediate_size"]
        block = attention + 3 * width * inner + 2 * inner + width + 2 * width
        return patch * width + tower["depth"] * block + merger + width
    inner = tower["mlp_ratio"] * width if family == "qwen2_vl" else tower["intermediate_size"]
    block = attention + 2 * width * inner + inner + width + 4 * width
    count = patch * width + tower["depth"] * block + merger + 2 * width
    if family == "qwen3_vl":
        count += width + tower["num_position_embeddings"] * width
        count += len(tower["deepstack_visual_indexes"]) * (merger + 2 * merged)
    return count


def _tiled_tower_parameters(tower: Mapping[str, Any], ratio: float, hidden_size: int) -> int:
    """Count the parameters of InternVL's vision tower and of the layers between it and the language model."""
    width, inner = tower.get("hidden_size", 1024), tower.get("intermediate_size", 4096)
    (height, across), (patch, _) = (
        size if isinstance(size, list) else (size, size)
        for size in (tower.get("image_size", 448), tower.get("patch_size", 14))
    )
    patches = (height // patch) * (across // patch)
    embedding = tower.get("num_channels", 3) * patch**2 * width + width + (patches + 2) * width
    attention = 4 * width**2 + width + 3 * width * tower.get("attention_bias", False)
    norms = 2 * width * (tower.get("norm_type", "layer_norm") == "layer_norm") + 2 * width
    norms += 2 * width * tower.get("use_qk_norm", False)
    block = attention + norms + 2 * width * inner + inner + width + 2 * width  # and scales of its two outputs
    merged = width * int(1 / ratio) ** 2
    projector = 2 * merged + merged * hidden_size + hidden_size + hidden_size**2 + hidden_size
    return embedding + tower.get("num_hidden_layers", 24) * block + projector


def fold_rope(path: str, override: Mapping[str, Any]) -> Mapping[str, Any]:
    """Put `rope_theta` and `rope_scaling` of an `override_config` into `rope_parameters`, with what the model has there.

    That is where transformers and vLLM read them. The override stays as it is if the model's file is not on this machine.
    """
    asked = {name: override[name] for name in (ROPE_THETA, ROPE_SCALING) if override.get(name) is not None}
    if not asked or (file := find_config(path)) is None:
        return override
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
        values = {**values, **(values.get("text_config") or {})}
        scaling = asked.get(ROPE_SCALING) or values.get(ROPE_SCALING) or {}
        known = {**(values.get(ROPE_PARAMETERS) or {}), **scaling, **(override.get(ROPE_PARAMETERS) or {})}
    except (OSError, ValueError, TypeError, AttributeError):
        return override  # the code that builds the model reports what is wrong
    theta = asked.get(ROPE_THETA, known.get(ROPE_THETA, values.get(ROPE_THETA)))
    kind = known.pop("type", None)
    folded = {"rope_type": kind or "default", **known} | ({} if theta is None else {ROPE_THETA: theta})
    rest = {name: value for name, value in override.items() if name not in (ROPE_THETA, ROPE_SCALING)}
    return {**rest, ROPE_PARAMETERS: folded}


def read_positions(path: str, override: Mapping[str, Any] | None = None) -> int | None:
    """Read the number of positions that a model was made for, as `read_model_facts` does; None if it is not known."""
    file = find_config(path)
    if file is None:
        return None
    try:
        values = {**json.loads(file.read_text(encoding="utf-8")), **(override or {})}
        return positions_from({**values, **(values.get("text_config") or {})})
    except (OSError, ValueError, TypeError, AttributeError):
        return None


def positions_from(values: Mapping[str, Any]) -> int | None:
    """Return the number of positions by the values of a `config.json`; None if it does not say.

    Scaling of rotary positions multiplies them, except for kinds whose `max_position_embeddings` is the scaled number.
    """
    most = values.get("max_position_embeddings") or values.get("n_positions")
    if not isinstance(most, int):
        return None
    rope = values.get("rope_scaling") or values.get("rope_parameters") or {}
    kind = rope.get("rope_type") or rope.get("type") or "default"
    if kind in ("default", "llama3", "longrope", "su"):
        return most
    original = rope.get("original_max_position_embeddings") if kind == "yarn" else None
    return max(most, int((original or most) * (rope.get("factor") or 1)))


def find_config(path: str) -> Path | None:
    """Find the `config.json` of a model: in its folder, or else in the Hub's local cache."""
    folder = Path(path).expanduser()
    try:
        if folder.is_dir():
            return folder / CONFIG_FILE if (folder / CONFIG_FILE).is_file() else None
        return _cached(path)
    except (OSError, ValueError):  # a name that the system cannot look up
        return None


def _cached(name: str) -> Path | None:
    """Find the file in the Hub's cache by its folder layout, since importing the Hub's library is slow."""
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
    """Build the shape of a model from the values of its `config.json`.

    Raises:
        KeyError, TypeError, AttributeError, ZeroDivisionError: keys have other names, or values other types.
    """
    kind = values.get("model_type", "")
    hidden, heads, layers = values["hidden_size"], values["num_attention_heads"], values["num_hidden_layers"]
    intermediate = values["intermediate_size"]
    biased = bool(values.get("attention_bias", False)) and kind not in QKV_BIASED  # these ignore the key
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
    """Return the layers with experts: every `decoder_sparse_step`-th, except those in `mlp_only_layers`."""
    step, dense = values.get("decoder_sparse_step") or 1, values.get("mlp_only_layers") or ()
    return tuple(layer for layer in range(layers) if (layer + 1) % step == 0 and layer not in dense)


def splits(size: int, *, heads: int, kv_heads: int, inner: int) -> bool:
    """Return whether `size` devices can each hold an equal part of every layer.

    `size` has to divide the attention heads and the MLP's `inner` size. It also has to divide the key-value heads, or be
    a multiple of them, in which case each is on several devices.
    """
    return not (heads % size or inner % size or (kv_heads % size and size % kv_heads))


def engine_problem(size: int, devices: int, *, heads: int, kv_heads: int, inner: int) -> str | None:
    """Explain why a rollout engine cannot split a model over `size` devices, and which size works; None if it can."""

    def works(size: int) -> bool:
        return splits(size, heads=heads, kv_heads=kv_heads, inner=inner)

    if works(size):
        return None
    best = max(n for n in range(1, size) if devices % n == 0 and works(n))
    return (
        f"cannot be split over {size} devices: it has {heads} attention heads, {kv_heads} key-value "
        f"head{'s' * (kv_heads != 1)} and MLPs of size {inner}. Set it to {best}"
    )


def nearest_sizes(size: int, most: int, works: Callable[[int], bool]) -> str:
    """List the sizes that work, the nearest below `size` and the nearest above up to `most`: `2 or 8`."""
    below = next((n for n in range(min(size - 1, most), 0, -1) if works(n)), None)
    above = next((n for n in range(size + 1, most + 1) if works(n)), None)
    return " or ".join(str(n) for n in (below, above) if n)
