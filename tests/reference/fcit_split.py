"""How FCIT's release (Ghy0501/FCIT, Apache-2.0; Guo et al., ICCV 2025) deals out rows and clients, in our own words.

Its global numpy generator, its loops over single rows; none of our code.
"""

from __future__ import annotations

import numpy as np


def cut(n: int, clients: int, beta: float, least: float, seed: int) -> list[list[int]]:
    """Rows of each client: shares drawn, rows shuffled, int(share n) at a time; all again while one has too few."""
    np.random.seed(seed)
    while True:
        shares = np.random.dirichlet([beta] * clients, size=1)[0]
        rows = list(range(n))
        order = np.arange(n)
        np.random.shuffle(order)
        files, at = [], 0
        for share in shares:
            many = int(share * n)
            files.append([rows[order[i]] for i in range(at, at + many)])
            at += many
        if all(len(f) >= least for f in files):
            return files


def clients_of(stage: int, round_: int, clients: int, part: float) -> list[int]:
    """A round's clients, in the order in which the release visits them."""
    np.random.seed(stage * 10 + round_)
    many = max(int(part * clients), 1)
    return [int(c) for c in set(np.random.choice(np.arange(clients), many, replace=False))]


def schedule(stage: int, units: int, clients: int, part: float) -> list[int]:
    """The units of a heterogeneous stage where no list is given."""
    np.random.seed(stage * 10)
    return sorted(int(u) for u in np.random.choice(np.arange(units), size=int(clients * part), replace=True))


# What the release's own files printed (client_participation_scheduling.py, process_data.py at 9b10259).
PRINTED_CLIENTS = {
    (0, 0): [2, 41, 10, 11, 28],
    (0, 1): [2, 35, 38, 40, 27],
    (3, 7): [0, 37, 41, 13, 49],
    (7, 9): [39, 42, 44, 48, 21],
}
PRINTED_SIZES = {  # 12 clients, seed 7, the least rows as the release has it: beta
    (0.5, 997): [1, 47, 17, 130, 20, 11, 93, 13, 456, 68, 124, 10],
    (1.0, 997): [6, 119, 45, 101, 302, 61, 55, 5, 24, 54, 90, 128],
    (5.0, 24000): [3237, 1291, 1094, 1616, 2501, 2107, 2023, 1427, 2066, 1709, 3190, 1733],
}
PRINTED_FIRST_ROWS = {(0.5, 997): [729], (1.0, 997): [567, 146, 974], (5.0, 24000): [6804, 17450, 15576]}
