"""What does generation beside training gain on 64 and 512 GPUs? A simulation.

    python benchmarks/async_scale.py [--measured FILE] [--parameters 7e9] [--mfu 0.4] [--steps 16] [--json FILE]

Nothing of that size was measured. `iiverl_core.division` simulates steps, as for `iiverl plan --divide`: a decoding step of an
engine reads its weights and the keys and values of all sequences once, at a share of the memory's bandwidth; training takes 6
FLOPs per parameter and token, at a share of the peak. Lengths are log-normal with σ = 1, a quarter of the limit on average,
and cut off at it. The division of the devices is the best one for each row.

With `--measured`, a JSON file of `benchmarks/gpu_check.py`, figures of one GPU take the place of assumptions where it has them:

- the share of the peak in training, and in passes without gradients, of its largest model;
- the time of an engine's step in excess of what the bandwidth explains, which a larger model has too; from models of two
  sizes, the share of the bandwidth as well;
- the time of a weight update, in proportion to the parameters.

What was measured, scaled and assumed is printed, and in the results.
"""

import argparse
import json
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from iiverl_core.config.model_facts import ModelFacts
from iiverl_core.division import MODES, Costs, Lengths, ModelSize, best_division, estimate_costs
from iiverl_core.division.costs import BANDWIDTH_SHARE, BANDWIDTHS, BF16, FORWARD, MFU
from iiverl_core.telemetry.flops import by_device_name, peak_flops

PROMPT, GROUP = 512, 16
PER_DEVICE = 32  # responses per device and step
LIMITS = (4096, 32768)
NAMES = {(0, False): "in turn", (1, False): "beside"}
TRAINING = ("train megatron", "train packed", "train padded")
ENGINES = ("rollout vllm",)


@dataclass(frozen=True)
class Figures:
    """What costs are made of; `origins` says of each where it comes from."""

    device: str
    mfu: float
    forward_mfu: float
    bandwidth_share: float
    overhead: float  # seconds of each step of an engine
    transfer: float  # seconds per parameter
    origins: dict[str, str]

    def costs(self, size: ModelSize) -> Costs:
        """Return the costs of a model; raises ValueError for an unknown device."""
        costs = estimate_costs(size, self.device, mfu=self.mfu, bandwidth_share=self.bandwidth_share)
        if costs is None:
            raise ValueError(f"nothing is known of {self.device}")
        return replace(
            costs,
            read=costs.read + self.overhead,
            computed=costs.computed * self.mfu / self.forward_mfu,
            transfer=self.transfer * size.parameters,
        )


def assumed(device: str, mfu: float, bandwidth_share: float) -> Figures:
    """Return figures of which none was measured."""
    origins = {
        "mfu": f"assumed: {mfu:.0%} of the peak",
        "forward_mfu": "assumed: as in training",
        "bandwidth_share": f"assumed: {bandwidth_share:.0%} of the memory's bandwidth",
        "overhead": "assumed: none",
        "transfer": "left out",
    }
    return Figures(device, mfu, mfu, bandwidth_share, 0.0, 0.0, origins)


def measured(file: Path, figures: Figures) -> Figures:
    """Replace figures by those of a file of `gpu_check.py`, as far as it has them for models that suit a GPU."""
    content = json.loads(file.read_text())
    device = content["machine"]["device"]
    peak, bandwidth = peak_flops(device), by_device_name(BANDWIDTHS, device)
    if peak is None or bandwidth is None:
        raise SystemExit(f"{file}: nothing is known of {device}")
    figures = replace(figures, device=device, origins=dict(figures.origins))
    sizes = {name: _facts(name) for name in ("0.5b", "1.5b")}  # the tiny model says nothing
    parts = {
        (part["part"], part["size"]): part["numbers"]
        for part in content["parts"]
        if part["state"] == "ok" and part["size"] in sizes
    }
    for part, size in ((part, size) for size in reversed(sizes) for part in TRAINING):
        if (numbers := parts.get((part, size))) and "MFU %" in numbers:
            forward = FORWARD * sizes[size].parameters * numbers["log-prob tokens/s"] / peak
            figures = replace(figures, mfu=numbers["MFU %"] / 100, forward_mfu=forward)
            where = f"of {size} on one {device} ({part})"
            figures.origins["mfu"] = (
                f"measured: {figures.mfu:.1%} of the peak, {where}; the same for the larger model"
            )
            figures.origins["forward_mfu"] = (
                f"measured: {forward:.1%}, {where}; the same for the larger model"
            )
            break
    found = {size: parts[part, size] for part in ENGINES for size in sizes if (part, size) in parts}
    return _of_engines(found, sizes, figures, bandwidth) if found else figures


def _of_engines(
    found: dict[str, dict[str, float]], sizes: dict[str, ModelFacts], figures: Figures, bandwidth: float
) -> Figures:
    """Take over the time of an engine's step, and that of a weight update."""
    from gpu_check_parts.rollout import RESPONSES
    from gpu_check_parts.setting import SIZES

    points = []  # bytes and seconds of a step
    for name, numbers in found.items():
        shape, model = SIZES[name], _size(sizes[name])
        sequences = shape.sequences * RESPONSES
        read = BF16 * model.parameters + model.cache_bytes * sequences * (
            shape.longest_prompt / 2 + shape.generated / 2
        )
        points.append((read, sequences / numbers["generated tokens/s"]))
    (read, seconds), last = points[-1], list(found)[-1]
    share, origin = figures.bandwidth_share, figures.origins["bandwidth_share"]
    if len(points) > 1 and points[-1][1] > points[0][1]:
        slope = (points[-1][1] - points[0][1]) / (points[-1][0] - points[0][0])
        share = min(1 / (slope * bandwidth), 1.0)
        origin = f"measured: {share:.0%}, from {' and '.join(found)} on one {figures.device}"
    overhead = max(seconds - read / (bandwidth * share), 0.0)
    parameters = sizes[last].parameters
    transfer = found[last]["weight update s"] / parameters
    return replace(
        figures,
        bandwidth_share=share,
        overhead=overhead,
        transfer=transfer,
        origins=figures.origins
        | {
            "bandwidth_share": origin,
            "overhead": f"measured: {1000 * overhead:.2f} ms of a step of {1000 * seconds:.2f} ms, of {last} on one "
            f"{figures.device}; the same for the larger model",
            "transfer": f"measured: {found[last]['weight update s']:.2f} s, of {last} within one {figures.device}; scaled "
            "by the parameters",
        },
    )


def _facts(name: str) -> ModelFacts:
    from gpu_check_parts.setting import SIZES

    shape = SIZES[name].shape
    return ModelFacts(
        model_type="qwen2",
        vocabulary=shape["vocab_size"],
        hidden_size=shape["hidden_size"],
        intermediate_size=shape["intermediate_size"],
        layers=shape["num_hidden_layers"],
        heads=shape["num_attention_heads"],
        kv_heads=shape["num_key_value_heads"],
        head_dim=shape["hidden_size"] // shape["num_attention_heads"],
        tied_embeddings=shape["tie_word_embeddings"],
        qkv_bias=True,
    )


def _size(facts: ModelFacts) -> ModelSize:
    return ModelSize(facts.parameters, facts.active_parameters, 2 * facts.layers * facts.kv_size * BF16)


def main() -> int:
    """Simulate both sizes and both limits, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--measured", type=Path, help="results of benchmarks/gpu_check.py")
    parser.add_argument("--device", default="NVIDIA H200")
    parser.add_argument("--parameters", type=float, default=7.6e9)
    parser.add_argument("--mfu", type=float, default=MFU, help="share of the peak FLOP/s, 0 to 1")
    parser.add_argument(
        "--bandwidth-share", type=float, default=BANDWIDTH_SHARE, help="of the memory's bandwidth, 0 to 1"
    )
    parser.add_argument("--devices", type=int, nargs="*", default=[64, 512])
    parser.add_argument("--steps", type=int, default=16)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    figures = assumed(given.device, given.mfu, given.bandwidth_share)
    if given.measured:
        figures = measured(given.measured, figures)
    # Keys and values are those of Qwen2.5-7B, in proportion.
    costs = figures.costs(ModelSize(given.parameters, given.parameters, 57344 * given.parameters / 7.6e9))
    print("\n".join(f"- {name}: {origin}" for name, origin in figures.origins.items()))
    print("\n| GPUs | limit | | max_staleness | generating | step | gain | idle: training | generating |")
    print("|---|---|---|---|---|---|---|---|---|")
    rows: list[dict[str, Any]] = []
    for devices in given.devices:
        for limit in LIMITS:
            rows += simulated(costs, devices, limit, given.steps)
    if given.json:
        arguments = {
            name: str(each) if isinstance(each, Path) else each for name, each in vars(given).items()
        }
        content = {"arguments": arguments | {"json": None}, "figures": figures.origins, "rows": rows}
        given.json.write_text(json.dumps(content, indent=1) + "\n")
    return 0


def simulated(costs: Costs, devices: int, limit: int, steps: int) -> list[dict[str, Any]]:
    """Simulate all modes, and print their rows."""
    lengths, rows = Lengths.assumed(limit, PROMPT, GROUP), []
    for k, partial in MODES:
        best = best_division(costs, lengths, PER_DEVICE * devices, devices, k=k, partial=partial, steps=steps)
        if best is None:
            raise SystemExit(f"{devices} devices cannot be divided")
        times = best.times
        row = {
            "devices": devices,
            "limit": limit,
            "mode": NAMES.get((k, partial), "beside, partial"),
            "max_staleness": k,
            "generating": best.generating,
            "step_s": round(times.step, 2),
            "gain": round((rows[0]["step_s"] if rows else times.step) / times.step, 2),
            "training_idle": round(times.training_idle, 3),
            "generating_idle": round(times.generating_idle, 3),
        }
        rows.append(row)
        print(
            f"| {devices} | {limit} | {row['mode']} | {k} | {best.generating} | {times.step:.1f} s | {row['gain']:.2f} | "
            f"{times.training_idle:.0%} | {times.generating_idle:.0%} |",
            flush=True,
        )
    return rows


if __name__ == "__main__":
    sys.exit(main())
