"""LoRA: low-rank adapters beside frozen linear layers (Hu et al. 2021, "LoRA: Low-rank adaptation of large language models").

An adapted layer computes `x W^T + scale · x A^T B^T`, in which only A (rank × inputs) and B (outputs × rank) are trained. Names
and files are those of PEFT: `lora_A.weight` and `lora_B.weight` below the name of the layer.
"""

import json
import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from hashlib import blake2b
from pathlib import Path
from typing import Any, Protocol

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from iiverl_core.config import ModelConfig
from iiverl_core.config.sections.model import is_named
from iiverl_core.errors import ConfigError, WeightMismatchError

A, B = "lora_A", "lora_B"
WEIGHTS_FILE, CONFIG_FILE = "adapter_model.safetensors", "adapter_config.json"
PROBES = 4  # random inputs of a layer
CHUNK = 2**24  # elements
ROUNDING = 2.0**-22  # of a merged weight in fp32, beside its norm
PREFIX = "base_model.model."  # of names in PEFT's files


class AdaptedLinear(nn.Linear):
    """A linear layer with frozen weights and an adapter of two small layers, `lora_A` and `lora_B`, in fp32.

    Its own parameters keep their names, so weights are read and found as in the model without adapters.
    """

    def __init__(self, base: nn.Linear, model: ModelConfig) -> None:
        """Take over the weights of `base`."""
        nn.Module.__init__(self)
        self.in_features, self.out_features = base.in_features, base.out_features
        self.weight, self.bias = base.weight, base.bias
        self.scale, self.enabled = model.lora_scale, True
        place = {"device": base.weight.device, "dtype": torch.float32}
        self.lora_A = nn.Linear(base.in_features, model.lora_rank, bias=False, **place)
        self.lora_B = nn.Linear(model.lora_rank, base.out_features, bias=False, **place)

    def forward(self, input: Tensor) -> Tensor:
        """Apply the layer, and its adapter unless that is off."""
        output = super().forward(input)
        return output + self.scale * self.lora_B(self.lora_A(input)) if self.enabled else output


def add_adapter(
    model: nn.Module, config: ModelConfig, head: nn.Module | None, frozen: nn.Module | None = None
) -> None:
    """Freeze a model and put adapters beside its linear layers, all but `head` and those of the part `frozen`.

    Nothing happens at rank 0.

    Raises:
        ValueError: no layer has a name that `target_modules` matches, or a name matches none.
    """
    if not config.lora_rank:
        return
    model.requires_grad_(False)
    left_out = {head, *(frozen.modules() if frozen is not None else ())}
    layers = {
        name: part
        for name, part in model.named_modules()
        if isinstance(part, nn.Linear) and part not in left_out
    }
    for name in chosen_layers(config, layers):
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, AdaptedLinear(layers[name], config))


def chosen_layers(config: ModelConfig, layers: Collection[str]) -> list[str]:
    """Return the names of those linear layers, of all but the head, that have an adapter.

    Raises:
        ValueError: `target_modules` matches none of them, or a name in it matches none.
    """
    unused = [each for each in config.target_modules if not any(is_named(name, (each,)) for name in layers)]
    chosen = [name for name in layers if config.adapts(name)]
    if unused or not chosen:
        known = ", ".join(sorted({name.rpartition(".")[2] for name in layers}))
        missing = f"no linear layer is named {', '.join(unused)}" if unused else "no linear layer is left"
        raise ValueError(f"{missing} (model.target_modules); its layers are {known}")
    return chosen


def adapted_layers(model: nn.Module) -> dict[str, AdaptedLinear]:
    """Return the adapted layers of a model by name."""
    return {name: part for name, part in model.named_modules() if isinstance(part, AdaptedLinear)}


def is_adapter(name: str) -> bool:
    """Whether a parameter of this name belongs to an adapter."""
    return name.rpartition(".")[0].endswith((f".{A}", f".{B}"))


class Switchable(Protocol):
    """An adapter that can be turned off."""

    enabled: bool


@contextmanager
def without_adapters(layers: Collection[Switchable]) -> Iterator[None]:
    """Let layers compute what their frozen weights alone do."""
    for layer in layers:
        layer.enabled = False
    try:
        yield
    finally:
        for layer in layers:
            layer.enabled = True


def merge_adapter(weight: Tensor, a: Tensor, b: Tensor, scale: float) -> Tensor:
    """Return `weight + scale · B A` in fp32 or wider."""
    wide = torch.promote_types(weight.dtype, torch.float32)
    return torch.addmm(weight.to(wide), b.to(wide), a.to(wide), alpha=scale)


def checked_merges(
    model: nn.Module, weights: Iterable[tuple[str, Tensor]], whole: Callable[[Tensor], Tensor]
) -> Iterator[tuple[str, Tensor]]:
    """Pass on the weights of a model, once those of adapted layers are seen to compute what these layers do.

    A layer and its merged weight, which is in fp32 or wider, are applied to the same random inputs in fp64: the output
    of a wrong one differs almost surely (Freivalds 1977). `whole` gathers a parameter from all processes. What differs
    does so by at most the rounding of fp32, which is small beside an adapter after a single step of 1e-6.

    Raises:
        WeightMismatchError: the merged weight of a layer is another one, or there is none.
    """
    layers = {f"{name}.weight": layer for name, layer in adapted_layers(model).items()}
    for name, weight in weights:
        layer = layers.pop(name, None)
        if layer is not None:
            _check_merged(name, layer, weight, whole)
        yield name, weight
    if layers:
        raise WeightMismatchError(
            f"no weights were merged for {', '.join(sorted(layers))}, which have adapters"
        )


def _check_merged(name: str, layer: AdaptedLinear, merged: Tensor, whole: Callable[[Tensor], Tensor]) -> None:
    weight, a, b = (whole(each.detach()) for each in (layer.weight, layer.lora_A.weight, layer.lora_B.weight))
    inputs = probe_inputs(name, PROBES, layer.in_features).to(weight.device)
    off = merged.new_zeros((), dtype=torch.float64)
    rows = max(1, CHUNK // layer.in_features)  # in fp64 at a time
    for start in range(0, layer.out_features, rows):
        part = slice(start, start + rows)
        parameters = {f"{A}.weight": a.double(), f"{B}.weight": b[part].double()}
        parameters["weight"] = weight[part].double()
        if layer.bias is not None:
            parameters["bias"] = inputs.new_zeros(len(weight[part]))
        expected = torch.func.functional_call(layer, parameters, (inputs,))
        off += (expected - inputs @ merged[part].double().t()).square().sum()
    size = weight.norm() + layer.scale * a.norm() * b.norm()
    if off.sqrt() > ROUNDING * PROBES**0.5 * size:
        raise wrong_merge(name, off.sqrt().item(), ROUNDING * size.item())


def wrong_merge(name: str, off: float, rounding: float) -> WeightMismatchError:
    """Return the error for a merged weight whose output is another one than that of its layer."""
    return WeightMismatchError(
        f"{name}, into which an adapter was merged, does not compute what the layer with its adapter does: their outputs "
        f"differ by {off:.2g}, where rounding explains {rounding:.1g}"
    )


def probe_inputs(name: str, count: int, width: int) -> Tensor:
    """Return random signs (count, width) in fp64, the same for a name in every process."""
    generator = torch.Generator().manual_seed(len(name))
    return 2 * torch.randint(2, (count, width), generator=generator).double() - 1


def merge_saved(
    base: Iterator[tuple[str, Tensor]], trained: Mapping[str, Tensor], scale: float
) -> Iterator[tuple[str, Tensor]]:
    """Yield the weights of a model with those of its adapter merged into them; other trained weights replace the base's.

    Raises:
        ValueError: after the last one: the base lacks a layer that has an adapter.
    """
    left = dict(trained)
    for name, weight in base:
        layer = name.removesuffix(".weight")
        a, b = left.pop(f"{layer}.{A}.weight", None), left.pop(f"{layer}.{B}.weight", None)
        if a is not None and b is not None:
            weight = merge_adapter(weight, a, b, scale).to(weight.dtype)
        yield name, left.pop(name, weight)
    adapters = sorted(name for name in left if is_adapter(name))
    if adapters:
        raise ValueError(f"the base model has no layer for {adapters[0]}")
    yield from left.items()


def initial_adapter(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Tensor]:
    """Return an adapter that does nothing yet: B is zero, and A uniform as in PEFT, the same for a name in every run."""
    weights: dict[str, Tensor] = {}
    for name, shape in shapes.items():
        weights[name] = torch.zeros(shape)
        if name.endswith(f"{A}.weight"):
            seed = int.from_bytes(blake2b(name.encode(), digest_size=7).digest(), "big")
            generator = torch.Generator().manual_seed(seed)
            nn.init.kaiming_uniform_(weights[name], a=math.sqrt(5), generator=generator)
    return weights


def starting_adapter(config: ModelConfig, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Tensor]:
    """Return the adapter that a run starts from: that at `lora_adapter_path`, or one without effect.

    Raises:
        ConfigError: see `read_adapter`.
    """
    return read_adapter(config, shapes) if config.lora_adapter_path else initial_adapter(shapes)


def read_adapter(config: ModelConfig, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Tensor]:
    """Read the adapter at `lora_adapter_path`, in PEFT's format, for layers of these shapes.

    Raises:
        ConfigError: there is none, or it has another scale, other layers or another rank.
    """
    path, where = str(config.lora_adapter_path), f"the adapter '{config.lora_adapter_path}'"
    try:
        folder = Path(path) if Path(path).exists() else Path(snapshot_download(path))
        settings = json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))
        saved = {name.removeprefix(PREFIX): value for name, value in load_file(folder / WEIGHTS_FILE).items()}
    except (OSError, ValueError, HfHubHTTPError) as error:
        raise ConfigError(f"{where} cannot be read: {error}") from error
    rank, alpha, rslora = settings.get("r"), settings.get("lora_alpha"), bool(settings.get("use_rslora"))
    if (rank, alpha, rslora) != (config.lora_rank, config.lora_alpha, config.use_rslora):
        raise ConfigError(
            f"{where} has lora_rank: {rank}, lora_alpha: {alpha}, use_rslora: {str(rslora).lower()}; the run has "
            f"{config.lora_rank}, {config.lora_alpha}, {str(config.use_rslora).lower()}. Set them to the adapter's"
        )
    found = {name: tuple(value.shape) for name, value in saved.items() if is_adapter(name)}
    for name in sorted(found.keys() | shapes.keys()):
        if found.get(name) != shapes.get(name):
            raise ConfigError(
                f"{where} does not fit the model: {name} has shape {found.get(name)} there and {shapes.get(name)} here; "
                "check model.path and model.target_modules"
            )
    return {name: saved[name].float() for name in shapes}


def write_adapter(weights: Mapping[str, Tensor], config: ModelConfig, folder: Path, *, task: str) -> None:
    """Write what was trained, an adapter and maybe a head, in PEFT's format; `task` is PEFT's `task_type`."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file(
        {f"{PREFIX}{name}": value.contiguous() for name, value in weights.items()},
        folder / WEIGHTS_FILE,
        metadata={"format": "pt"},
    )
    adapters = [name for name in weights if is_adapter(name)]
    settings: dict[str, Any] = {
        "peft_type": "LORA",
        "task_type": task,
        "base_model_name_or_path": config.path,
        "r": config.lora_rank,
        "lora_alpha": config.lora_alpha,
        "use_rslora": config.use_rslora,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": sorted({name.split(f".{A}.")[0] for name in adapters if f".{A}." in name}),
        "modules_to_save": sorted({name.split(".")[0] for name in weights if not is_adapter(name)}) or None,
        "inference_mode": True,
    }
    (folder / CONFIG_FILE).write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
