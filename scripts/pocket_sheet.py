"""Draws docs/img/pocket_tasks.png: pictures of the eight pocket tasks with question and answer. Needs
matplotlib.
"""

from __future__ import annotations

import textwrap
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from retain.pocket.stream import pocket

OUT = Path(__file__).parent.parent / "docs/img/pocket_tasks.png"
EACH = 3


def main() -> None:
    """One column a task, three test pictures each."""
    stream = pocket(seed=0, n_train=1, n_test=EACH, n_valid=1)
    figure, axes = plt.subplots(EACH, len(stream), figsize=(17, 8.2))
    for column, task in enumerate(stream):
        for row, example in enumerate(task.test):
            axis = axes[row][column]
            axis.imshow(example.images[0], interpolation="nearest")
            axis.set_xticks([])
            axis.set_yticks([])
            text = (
                textwrap.fill(example.question.replace("\n", " "), 26)
                + "\n"
                + textwrap.fill(f"> {example.answer}", 26)
            )
            axis.set_xlabel(text, fontsize=8)
            if row == 0:
                axis.set_title(task.name, fontsize=11, fontweight="bold")
    figure.tight_layout()
    OUT.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(OUT, dpi=80)


if __name__ == "__main__":
    main()
