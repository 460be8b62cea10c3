"""What a check found: one line each, and all of them as a screen of text, JSON and an exit code."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from typing import Any

STATES = ("ok", "note", "warn", "FAIL")


@dataclass(frozen=True)
class Finding:
    """One line: what was looked at, how it is, and in words what was seen and, where it is wrong, what to do."""

    check: str
    state: str  # one of STATES; "note" is worth knowing and nothing to mend
    says: str

    def line(self) -> str:
        return f"{self.state:<4}  {self.check:<14} {self.says}"


@dataclass
class Report:
    """All findings about one checkpoint, in the order in which they were looked at."""

    source: str
    findings: list[Finding] = field(default_factory=list)

    def add(self, check: str, state: str, says: str) -> None:
        assert state in STATES, state
        # what a file says ends up here: one line stays one line, and no control character reaches the terminal
        plain = "".join(c if c.isprintable() else " " for c in says)
        self.findings.append(Finding(check, state, " ".join(plain.split())))

    def add_first(self, check: str, state: str, problems: Iterable[str], limit: int = 3) -> bool:
        """The first problems, a line each, and how many more there are; whether there were any."""
        all_of_them = list(problems)
        for problem in all_of_them[:limit]:
            self.add(check, state, problem)
        if len(all_of_them) > limit:
            self.add(check, state, f"and {len(all_of_them) - limit} more of this kind")
        return bool(all_of_them)

    @property
    def failed(self) -> bool:
        return any(finding.state == "FAIL" for finding in self.findings)

    def lines(self) -> list[str]:
        count = {state: sum(f.state == state for f in self.findings) for state in STATES}
        verdict = "this checkpoint cannot be used as it is" if self.failed else "this checkpoint can be used"
        tail = f"{verdict}: {count['FAIL']} failed, {count['warn']} warnings, {count['ok']} in order"
        return [self.source, *(finding.line() for finding in self.findings), tail]

    def to_dict(self) -> dict[str, Any]:
        return {"source": self.source, "usable": not self.failed, "findings": [asdict(f) for f in self.findings]}


def of(number: int | float, unit: str = "GB") -> str:
    """Bytes for the eye, in powers of ten, as disks and model cards count: 32.8 GB."""
    return f"{number / {'GB': 1e9, 'MB': 1e6}[unit]:,.1f} {unit}"
