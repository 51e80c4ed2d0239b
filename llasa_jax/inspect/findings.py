"""What the doctor says: a finding, and how many clips it concerns."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from llasa_jax.errors import printable
from llasa_jax.inspect.scan import Scan

Severity = Literal["ok", "warn", "bad"]
MANY = 0.01  # the share of records from which a fault means a broken dataset, not an odd clip


@dataclass(frozen=True)
class Finding:
    """`severity` "bad" makes training worthless, "warn" makes it worse. `ids` are examples. `fix`
    says what to do; "" for ok.
    """

    severity: Severity
    check: str
    message: str
    fix: str = ""
    ids: tuple[str, ...] = ()

    def __str__(self) -> str:
        ids = f" [{', '.join(self.ids)}]" if self.ids else ""
        fix = f"; {self.fix}" if self.fix else ""
        return printable(f"{self.severity:4}  {self.check:9}  {self.message}{ids}{fix}")


def clips(count: int, scan: Scan) -> str:
    """ "3 clips", and of how many where the scan is a sample."""
    sampled = f" of {len(scan.ids):,} examined" if scan.is_sample else ""
    return f"{count:,} clip{'s' if count != 1 else ''}{sampled}"


def examples(ids: Iterable[str], most: int = 3) -> tuple[str, ...]:
    return tuple(clip for clip, _ in zip(ids, range(most), strict=False))


def grave(count: int, of: int, limit: float = MANY) -> Severity:
    """ "bad" where more than `limit` of the records are concerned, else "warn"."""
    return "bad" if count > limit * of else "warn"
