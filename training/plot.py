"""The curve of a run as an image: what was lost, earned and held out, over what was seen."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

PANELS: Mapping[str, Mapping[str, str]] = {
    "loss (nats)": {"loss": "loss"},
    "reward, training": {"reward": "reward of the rollouts"},
    "pairs preferred": {"preferred": "better of a pair likelier than before"},
    "entropy (nats)": {"entropy": "entropy"},
    "pass@1, dev": {"dev_raw_pass": "raw", "dev_full_pass": "full"},
}
"""By the label of the axis: the keys of points that it shows, and their names."""
STYLES = ("o-", "s--")


def draw(curve: Sequence[Mapping[str, float]], path: Path) -> None:
    """Write a PNG with a panel for each kind of number that the curve has; nothing for an empty curve."""
    panels = {
        label: present
        for label, names in PANELS.items()
        if (present := {key: name for key, name in names.items() if any(key in point for point in curve)})
    }
    if not panels:
        return
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4 * len(panels), 3), layout="constrained")
    FigureCanvasAgg(figure)
    figure_axes = figure.subplots(1, len(panels), squeeze=False)[0]
    unit = "step" if "step" in curve[0] else "tokens"
    for axes, (label, names) in zip(figure_axes, panels.items(), strict=True):
        for style, (key, name) in zip(STYLES, names.items(), strict=False):
            points = [(point[unit], point[key]) for point in curve if key in point]
            axes.plot(*zip(*points, strict=True), style, label=name, markersize=4 if len(points) < 30 else 0)
        axes.set(xlabel=unit, ylabel=label)
        if "pass" in label or "reward" in label or "preferred" in label:
            axes.set_ylim(0, 1.02)
        if len(names) > 1:
            axes.legend()
    figure.savefig(path, dpi=80, metadata={"Software": None})
