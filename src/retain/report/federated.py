"""What a federated run adds to its report: scores by stage, what travelled, and who was left out and why."""

from __future__ import annotations

from collections import Counter
from typing import Any

from retain.metrics.stages import StageScore, last_and_avg, stage_scores
from retain.report.load import Run
from retain.report.summary import size

View = dict[str, Any]


def is_federated(run: Run) -> bool:
    """Whether clients learned."""
    return bool(run.config.get("federated"))


def stages_of(run: Run) -> list[StageScore]:
    """The finished stages of a run."""
    rows = run.learned
    scores = [
        {
            t: sum(float(p["score"]) for p in found) / len(found)
            for t in run.tasks
            if (found := row.predictions(t))
        }
        for row in rows
    ]
    return stage_scores([row.task for row in rows], [row.folder.learned for row in rows], scores)


def federated_view(run: Run) -> View | None:
    """The section; None for a central run."""
    if not is_federated(run) or not run.learned:
        return None
    rounds = [e for e in run.events if e.get("kind") == "round"]
    left = [e for e in run.events if e.get("kind") == "client_left_out"]
    found, rows = stages_of(run), []
    for stage in found:
        mine = [e for e in rounds if e.get("task") == stage.name]
        asked = sum(len(e.get("clients", {})) for e in mine)
        clients = {c for e in mine for c in e.get("clients", {})}
        sent, received = (sum(float(e.get(k, 0)) for e in mine) for k in ("sent", "received"))
        gone = sum(1 for e in left if e.get("task") == stage.name)
        rows.append(
            [stage.name, ", ".join(stage.seen), f"{stage.mean:.1f}", str(len(mine)), str(len(clients)),
             size(sent / asked) if asked else "–", size(received / asked) if asked else "–", str(gone)]
        )  # fmt: skip
    last, avg = last_and_avg(found)
    head = [
        "stage",
        "tasks seen",
        "their mean",
        "rounds",
        "clients",
        "to a client",
        "from a client",
        "left out",
    ]
    reasons = Counter((str(e.get("client")), str(e.get("why"))) for e in left)
    words = [
        f"{client}: {why}" + (f" ({n} times)" if n > 1 else "")
        for (client, why), n in reasons.most_common(12)
    ]
    return {"columns": head, "rows": rows, "last": f"{last:.1f}", "avg": f"{avg:.1f}", "left": words}
