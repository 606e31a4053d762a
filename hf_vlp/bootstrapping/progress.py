"""Lines that say, while a job runs, how fast it is and what it yields."""

import time
from collections.abc import Callable, Sequence
from typing import Any

from hf_vlp.bootstrapping.ledger import Counts, Ledger, UnitEntry


class Progress:
    """Throughput and yield of all processes, as far as their units are done, and of this one to the record.

    Args:
        ledger: of the job; read again before every line.
        sources: of the job; their size tells how far it is.
        every: seconds between lines.
        say: takes a line; None for no lines.
    """

    def __init__(
        self, ledger: Ledger, sources: Sequence[Any], every: float, say: Callable[[str], None] | None
    ) -> None:
        self.ledger, self.every, self.say = ledger, every, say
        sizes = [None if source.is_stream else len(source.rows) for source in sources]
        self.size = None if None in sizes else sum(sizes)
        self.before = ledger.totals().report.seen
        self.started = self.spoke = time.monotonic()
        self._open = 0
        if say is not None and self.before:
            say(f"going on behind {self.before:,} records that are done")

    def records(self, count: int) -> None:
        """Some records of the unit at work are done."""
        self._open += count
        self._speak()

    def unit(self, entry: UnitEntry) -> None:
        """The unit at work is done; the ledger has it."""
        self._open = 0
        self._speak()

    def line(self) -> str:
        """The line for now."""
        totals = self.ledger.totals()
        done = totals.report.seen + self._open
        rate = (done - self.before) / max(1e-9, time.monotonic() - self.started)
        share = f" of {self.size:,} ({done / self.size:.0%})" if self.size else ""
        parts = [f"{done:,}{share} records, {rate:,.1f} a second, {totals.report.bad_total:,} bad"]
        parts += [yield_of(origin, counts) for origin, counts in sorted(totals.texts.items())]
        if self.size and rate > 0 and done < self.size:
            parts.append(f"about {duration((self.size - done) / rate)} to go")
        return "; ".join(parts)

    def _speak(self) -> None:
        if self.say is None or time.monotonic() - self.spoke < self.every:
            return
        self.spoke = time.monotonic()
        self.ledger.refresh()
        self.say(self.line())


def yield_of(origin: str, counts: Counts) -> str:
    """ "web: 61.2% of 12,001 texts kept"."""
    return f"{origin}: {counts.kept / max(1, counts.seen):.1%} of {counts.seen:,} texts kept"


def duration(seconds: float) -> str:
    """ "40 s", "12 min", "3.5 h"."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
