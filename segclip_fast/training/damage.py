"""Samples that a run left out because they cannot be used; every rank counts the same ones."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

from ..data.opening import container
from ..data.pipeline import Damage

_FEW = 1000  # shown samples, below which a share says nothing yet


class Damaged:
    """The damaged samples of a run, each once, by shard or folder.

    Args:
        limit: share of the shown samples above which `check` stops the run.
        before: those of the log that a run continues from.
    """

    def __init__(self, limit: float, before: Iterable[Damage] = ()) -> None:
        self.limit = limit
        self.reasons: dict[str, str] = {}  # by the sample's name
        self.add(list(before))

    def __len__(self) -> int:
        return len(self.reasons)

    def add(self, found: Sequence[Damage]) -> list[Damage]:
        """Note some; returns those that were not known."""
        new = []
        for damage in found:
            if damage.key not in self.reasons:
                self.reasons[damage.key] = damage.reason
                new.append(damage)
        return new

    def counts(self) -> dict[str, dict[str, int]]:
        """How many there are, by shard or folder, then by what is damaged (picture, caption, ...)."""
        found: dict[str, Counter[str]] = {}
        for key, reason in self.reasons.items():
            found.setdefault(container(key), Counter())[reason.partition(":")[0]] += 1
        return {place: dict(counter) for place, counter in sorted(found.items())}

    def check(self, shown: int) -> None:
        """Stop the run if too many of the `shown` samples were damaged.

        Raises:
            ValueError: they are more than the limit; names the shard or folder with most of them.
        """
        if len(self) <= self.limit * max(shown, _FEW):
            return
        totals = {place: sum(kinds.values()) for place, kinds in self.counts().items()}
        worst = max(totals, key=lambda place: totals[place])
        key, reason = next((key, why) for key, why in self.reasons.items() if container(key) == worst)
        got = f"{len(self)} of {shown}, {totals[worst]} of them in {worst or 'one source'} ({key}: {reason})"
        advice = "mend or leave out what the log lists as damaged, or raise data.max_damaged"
        raise ValueError(f"data.max_damaged: expected a share of at most {self.limit:g}, got {got}; {advice}")

    def summary(self) -> dict[str, Any]:
        """For the log: the number, and `counts`."""
        return {"damaged": len(self), "by_container": self.counts()}
