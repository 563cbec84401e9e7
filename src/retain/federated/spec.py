"""A recipe's `federated:` block: who has what (`SplitSpec`), the server's rule, and what a round tolerates."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from retain.federated.split import SplitSpec
from retain.values import NotNegative, Positive, ranged


@ranged("federated")
@dataclass(frozen=True)
class FederatedSpec(SplitSpec):
    """How a run is federated.

    `server` is a name or `{name: {field: value}}`; empty: that of the method, else `fedavg`. An update more than
    `outlier` times as large as the median of the others' is left out (0: off). `deadline`: seconds that a client has
    for a round when it is on another machine.
    """

    server: dict[str, Any] = field(default_factory=dict)
    outlier: NotNegative = 10.0
    deadline: Positive = 3600.0
