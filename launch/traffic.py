"""The communication of a run in numbers per step: what each group of ranks did, by which algorithm, and what for.

    group    collective      algorithm   purpose     calls     steps        sent    received   of the largest rank
    dp       all_reduce      window                      3         6     2.36 MB     2.36 MB     2.36 MB     2.36 MB
    dp       all_reduce      staged      loss            1         1        16 B        16 B        16 B        16 B

Purpose "" is the training step itself; the loss sums, the log, validation and checkpoints stand apart. Bytes by the
formulas of the algorithms (`dtrain/collectives/volumes.py`). Numbers are means over steps: 0.1 calls is one call in
ten steps.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from dtrain.collectives.counters import WORDS, Key
from dtrain.mesh import Mesh

Totals = dict[tuple[str, Key], tuple[int, ...]]  # (group, row) -> calls, steps, sent, received


class Traffic:
    """Counts from its making on; `rows` tells what was done since, per step."""

    def __init__(self, mesh: Mesh) -> None:
        self.mesh = mesh
        self.start = self._totals()

    def _totals(self) -> Totals:
        return {
            (comm.name, key): sums
            for comm in self.mesh.communicators()
            if comm.size > 1
            for key, sums in comm.counters.totals().items()
        }

    def rows(self, steps: int) -> list[dict[str, Any]]:
        """One dict per group, collective, algorithm and purpose, the step's own first. Collective; on rank 0 complete.

        calls, steps, sent and received (bytes) of rank 0, and under `largest` the maximum of each over the ranks.
        """
        now = self._totals().items()
        mine = [[*key, np.subtract(sums, self.start.get(key, (0,) * len(WORDS))).tolist()] for key, sums in now]
        with self.mesh.comm.counters.purpose("log"):
            gathered = self.mesh.comm.all_gather_object(mine)
        everyone = [{(group, Key(*key)): sums for group, key, sums in rank} for rank in gathered]
        keys = {key for each in everyone for key, sums in each.items() if any(sums)}
        found = []
        for group, key in sorted(keys, key=lambda key: (key[1].purpose, key)):
            sums = np.array([each.get((group, key), [0] * len(WORDS)) for each in everyone]) / max(1, steps)
            row: dict[str, Any] = {"group": group, **key._asdict(), **dict(zip(WORDS, sums[0].tolist(), strict=True))}
            row["largest"] = dict(zip(WORDS, sums.max(0).tolist(), strict=True))
            found.append(row)
        return found


def table(rows: list[dict[str, Any]], title: str) -> Iterator[str]:
    """The rows as lines; nothing where no rank has a peer."""
    if not rows:
        return
    yield title
    words = ("group", "collective", "algorithm", "purpose")
    widths = [max(len(word), *(len(row[word]) for row in rows)) + 2 for word in words]
    texts = "".join(word.ljust(width) for word, width in zip(words, widths, strict=True))
    yield f"  {texts}{'calls':>7}{'steps':>8}{'sent':>11}{'received':>11}   largest rank: sent   received"
    for row in rows:
        texts = "".join(row[word].ljust(width) for word, width in zip(words, widths, strict=True))
        most = row["largest"]
        yield (
            f"  {texts}{row['calls']:>7.4g}{row['steps']:>8.4g}{_bytes(row['sent']):>11}{_bytes(row['received']):>11}"
            f"{_bytes(most['sent']):>21}{_bytes(most['received']):>11}"
        )


def _bytes(number: float) -> str:
    """1234567 -> "1.235 MB" (1e6 bytes)."""
    for factor, unit in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if number >= factor:
            return f"{number / factor:.4g} {unit}"
    return f"{number:.4g} B"
