"""Taking turns: runs hearth and its peers alternately and turns their samples into rows of a table."""

import dataclasses
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from typing import Any

MIB = 1 << 20


class Missing(Exception):
    """A peer, or an option of hearth, is not there; the message is one sentence."""


@dataclasses.dataclass(frozen=True)
class Finished:
    """What one process printed and took."""

    stdout: str
    seconds: float
    peak_rss_bytes: int
    read_bytes: int = 0  # from disk


@dataclasses.dataclass(frozen=True)
class Sample:
    """One measurement; `value` in the unit of its row."""

    value: float
    peak_rss_bytes: int = 0


@dataclasses.dataclass(frozen=True)
class Row:
    """One comparison. The ratio is always hearth's median over the peer's."""

    work: str
    unit: str
    peer_name: str
    hearth: list[float]
    peer: list[float]
    bar: float | None = None
    higher_is_better: bool = True

    @property
    def ratio(self) -> float:
        return statistics.median(self.hearth) / statistics.median(self.peer)

    @property
    def met(self) -> bool | None:
        """None where the row has no bar of its own."""
        if self.bar is None:
            return None
        return self.ratio >= self.bar if self.higher_is_better else self.ratio <= self.bar

    def as_json(self) -> dict[str, Any]:
        return {
            "work": self.work,
            "unit": self.unit,
            "peer_name": self.peer_name,
            "hearth": statistics.median(self.hearth),
            "peer": statistics.median(self.peer),
            "ratio": self.ratio,
            "bar": self.bar,
            "higher_is_better": self.higher_is_better,
            "met": self.met,
            "hearth_spread": spread(self.hearth),
            "peer_spread": spread(self.peer),
            "hearth_samples": self.hearth,
            "peer_samples": self.peer,
        }


@dataclasses.dataclass
class Report:
    """What a script prints: rows, the peers' versions, and a sentence for each thing that could not be measured."""

    rows: list[Row] = dataclasses.field(default_factory=list)
    peers: dict[str, str] = dataclasses.field(default_factory=dict)
    notes: list[str] = dataclasses.field(default_factory=list)

    def attempt(self, measure: Callable[[], None]) -> None:
        """Runs `measure`; what is missing becomes a note and nothing else stops."""
        try:
            measure()
        except Missing as missing:
            self.notes.append(str(missing))
            print(f"skipped: {missing}", file=sys.stderr)

    def show(self, as_json: bool) -> None:
        if as_json:
            rows = [row.as_json() for row in self.rows]
            print(json.dumps({"rows": rows, "peers": self.peers, "notes": self.notes}))
            return
        for row in self.rows:
            print(line_of(row))
        for name, version in sorted(self.peers.items()):
            print(f"{name} {version}")


def spread(values: Sequence[float]) -> float:
    """Interquartile range over the median; 0 for fewer than two values."""
    if len(values) < 2:
        return 0.0
    low, _, high = statistics.quantiles(values, n=4, method="inclusive")
    return (high - low) / statistics.median(values)


def line_of(row: Row) -> str:
    verdict = {None: "", True: "met", False: "NOT met"}[row.met]
    sign = "≥" if row.higher_is_better else "≤"
    bar = f"bar {sign} {row.bar:g} {verdict}" if row.bar is not None else ""
    medians = [f"{statistics.median(values):9.2f} ± {spread(values):4.0%}" for values in (row.hearth, row.peer)]
    return f"{row.work:52} hearth {medians[0]}  {row.peer_name} {medians[1]} {row.unit}  ratio {row.ratio:.3f}  {bar}"


def take_turns(sides: dict[str, Callable[[], Sample]], rounds: int) -> dict[str, list[Sample]]:
    """`rounds` samples of every side, one side after another in each round, so that a slow minute slows them all."""
    samples: dict[str, list[Sample]] = {name: [] for name in sides}
    for done in range(rounds):
        for name, measure in sides.items():
            sample = measure()
            samples[name].append(sample)
            print(f"  {done + 1}/{rounds} {name}: {sample.value:.2f}", file=sys.stderr)
    return samples


def rows_against(
    work: str, unit: str, samples: dict[str, list[Sample]], bar: float | None, higher_is_better: bool = True
) -> list[Row]:
    """A row against each peer; the bar holds against the best of them."""
    values = {name: [sample.value for sample in taken] for name, taken in samples.items()}
    hearth = values.pop("hearth")
    best = (max if higher_is_better else min)(values, key=lambda name: statistics.median(values[name]))
    return [
        Row(work, unit, name, hearth, peer, bar if name == best else None, higher_is_better)
        for name, peer in values.items()
    ]


def memory_row(work: str, samples: dict[str, list[Sample]], peer: str, bar: float | None) -> Row:
    """Peak resident memory of the same runs."""
    mib = {name: [sample.peak_rss_bytes / MIB for sample in samples[name]] for name in ("hearth", peer)}
    return Row(f"{work}, peak RSS", "MiB", peer, mib["hearth"], mib[peer], bar, higher_is_better=False)


def run(command: Sequence[object], environment: dict[str, str] | None = None) -> Finished:
    """Runs a command to its end; a failure is `Missing` with the last line that it wrote."""
    words = [str(word) for word in command]
    with tempfile.TemporaryFile() as errors:
        start = time.perf_counter()
        settings = {**os.environ, **(environment or {})}
        try:
            child = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=errors, env=settings)
        except OSError as error:
            raise Missing(f"`{words[0]}` cannot be started: {error.strerror}") from error
        with child:
            stdout = child.stdout.read() if child.stdout else b""
            # Unlike wait(), this tells the memory of this one process.
            _, status, usage = os.wait4(child.pid, 0)
            seconds = time.perf_counter() - start
            child.returncode = os.waitstatus_to_exitcode(status)
        if child.returncode != 0:
            errors.seek(0)
            lines = errors.read().decode(errors="replace").strip().splitlines()
            raise Missing(f"`{' '.join(words)}` failed with {child.returncode}: {lines[-1] if lines else 'no message'}")
    # Linux counts in KiB, macOS in bytes.
    scale = 1 if sys.platform == "darwin" else 1024
    return Finished(stdout.decode(errors="replace"), seconds, usage.ru_maxrss * scale, usage.ru_inblock * 512)


def json_lines(text: str) -> list[dict[str, Any]]:
    """The objects among lines of output."""
    return [json.loads(line) for line in text.splitlines() if line.startswith("{")]
