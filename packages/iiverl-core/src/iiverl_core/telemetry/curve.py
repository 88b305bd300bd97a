"""Smooth a curve over training steps, and draw it as text and as a PNG."""

import math
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path

MAX_POINTS = 400
DOT_COLOUR, LINE_COLOUR = "#9ecae1", "#08519c"


def moving_average(values: Sequence[float], window: int) -> list[float]:
    """Average each value with its neighbours in a centred window, cut off at the ends."""
    sums = [0.0, *accumulate(values)]
    n, reach = len(values), window // 2
    spans = [(max(0, i - reach), min(n, i + reach + 1)) for i in range(n)]
    return [(sums[b] - sums[a]) / (b - a) for a, b in spans]


def trend_window(n: int) -> int:
    """Return an odd window of about n/15 values, which smooths a curve and keeps its shape."""
    return n // 15 | 1


def nice_ticks(low: float, high: float, about: int) -> list[float]:
    """Return about `about` round numbers in [low, high], in steps of 1, 2 or 5 times a power of ten."""
    span = (high - low) / max(about, 1)
    power = 10.0 ** math.floor(math.log10(span))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= span * 0.7)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [i * step for i in range(first, last + 1)]


def draw_text(
    steps: Sequence[int], values: Sequence[float], title: str, *, width: int = 80, colour: bool
) -> str:
    """Draw at least two values as dots and their moving average as a line, in `width` columns and 18 rows."""
    import plotext

    low, high = _limits(values)
    first, last = steps[0], steps[-1]
    figure = plotext.figure.clear()
    figure.theme("colorless").plot_size(width, 18).title(title)
    figure.label("training step (dots: each step, line: moving average)", "x")
    figure.ruler("y").lim(low, high)
    figure.ruler("x").lim(first, last)
    figure.ruler("y").ticks(*_labelled(nice_ticks(low, high, 5)))
    figure.ruler("x").ticks(*_labelled([tick for tick in nice_ticks(first, last, 6) if tick == int(tick)]))
    stride = math.ceil(len(steps) / MAX_POINTS)
    xs = list(steps[::stride])
    average = moving_average(values, trend_window(len(values)))
    dots = plotext.marker("·", plotext.pixel("cyan"))
    line = plotext.marker("braille", plotext.pixel("green"))
    figure.draw(figure.signal(xs, list(values[::stride]), marker=dots))
    figure.draw(figure.signal(xs, average[::stride], marker=line).lines())
    rows = figure.build().string(colorless=not colour).splitlines()
    return "\n".join(row.rstrip() for row in rows)


def draw_png(path: Path, steps: Sequence[int], values: Sequence[float], title: str) -> None:
    """Draw the values as dots and their moving average as a line, as a PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(8, 4.5), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    window = trend_window(len(values))
    if window > 1:
        axes.plot(steps, values, "o", ms=4, alpha=0.6, mew=0, color=DOT_COLOUR, label="each step")
    average = f"moving average over {window} steps" if window > 1 else "each step"
    axes.plot(steps, moving_average(values, window), linewidth=2.5, color=LINE_COLOUR, label=average)
    axes.set(xlabel="training step", ylabel="mean reward")
    axes.set_title(title, parse_math=False)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    figure.savefig(path)


def _limits(values: Sequence[float]) -> tuple[float, float]:
    low, high = min(values), max(values)
    margin = (high - low) * 0.05 or max(abs(high) * 0.1, 0.1)
    return low - margin, high + margin


def _labelled(ticks: Sequence[float]) -> tuple[list[float], list[str]]:
    return list(ticks), [f"{tick:.10g}" for tick in ticks]
