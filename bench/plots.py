"""The plots of docs/benchmarks.md."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import matplotlib as mpl

mpl.use("Agg")
from matplotlib import pyplot as plt

if TYPE_CHECKING:
    from collections.abc import Sequence

    from matplotlib.figure import Figure

IMAGES = Path(__file__).parent.parent / "docs" / "img"
OURS, PEER = "#1b6ca8", "#9aa5b1"


def bars(name: str, title: str, values: dict[str, float], unit: str) -> None:
    """Draw horizontal bars; ours stand out."""
    figure, axes = plt.subplots(figsize=(8, 0.42 * len(values) + 1.2), layout="constrained")
    names = list(values)[::-1]
    drawn = axes.barh(
        names, [values[n] for n in names], color=[OURS if n.startswith("ours") else PEER for n in names]
    )
    axes.bar_label(drawn, fmt="%.2f", padding=3)
    axes.set_xlabel(unit)
    axes.set_title(title, loc="left")
    axes.spines[["top", "right"]].set_visible(False)
    axes.margins(x=0.12)
    _save(figure, name)


def lines(
    name: str, title: str, labels: tuple[str, str], x: Sequence[float], series: dict[str, Sequence[float]]
) -> None:
    """Draw cost against work, the work on a logarithmic axis."""
    figure, axes = plt.subplots(figsize=(8, 3.6), layout="constrained")
    for label, values in series.items():
        axes.plot(x, values, marker="o", label=label)
    axes.set_xscale("log")
    axes.set_ylim(bottom=0)
    axes.set_xlabel(labels[0])
    axes.set_ylabel(labels[1])
    axes.set_title(title, loc="left")
    axes.spines[["top", "right"]].set_visible(False)
    if len(series) > 1:
        axes.legend(frameon=False)
    _save(figure, name)


def _save(figure: Figure, name: str) -> None:
    IMAGES.mkdir(parents=True, exist_ok=True)
    figure.savefig(IMAGES / f"{name}.png", dpi=110, metadata={"Software": None})
    plt.close(figure)
