"""Generating with a model four times larger than memory: hearth's streaming against llama.cpp's mmap and the disk.

    python benches/peers/streaming.py target/release/hearth [--rounds 5] [--json]

Every process runs in a memory cgroup of a quarter of the model's size (a third for 32 sequences, whose KV cache is
larger); hearth is told so with `--memory`. The disk's own speed is measured in turn with the others (`hearth bench io`).
Needs a cgroup that may be written, so mostly root.
"""

import dataclasses
import pathlib
import statistics

import llama
from asked import Asked, asked
from limit import Limit, forget
from models import BILLION
from turns import MIB, Finished, Report, Row, Sample, json_lines, rows_against, take_turns

PEER_BAR, DISK_BAR = 2.0, 0.9
# Sequences at once, and which part of the model's size is memory.
BATCHES = {1: 4, 8: 4, 32: 3}


@dataclasses.dataclass(frozen=True)
class Setting:
    """One model in `1 / part` of its size."""

    asked: Asked
    gguf: pathlib.Path
    bundle: pathlib.Path
    part: int = 4

    @property
    def limit(self) -> Limit:
        return Limit(self.gguf.stat().st_size // self.part)

    @property
    def memory(self) -> str:
        """What of the limit weights and caches may take; the rest is the program's own."""
        total = self.limit.limit_bytes
        ring = 34 * self.part // 4
        return f"device={total * (89 - ring) // 100},host={total * ring // 100}"

    @property
    def tokens(self) -> int:
        return 8 if self.asked.quick else 16

    def generate(self, read: list[float]) -> Sample:
        """Tokens a second of hearth; appends the bytes read per pass."""
        forget(self.bundle)
        words = ["generate", self.bundle, "--memory", self.memory, "--tokens", "1,2,3,4", "--ignore-eos"]
        options = ["-n", self.tokens, "--threads", self.asked.threads, "--json"]
        done = self.limit.run([self.asked.hearth.binary, *words, *options])
        found = json_lines(done.stdout)[-1]
        read.append(found["streaming"]["bytes_per_pass"] / MIB)
        return Sample(found["decode_tok_s"], done.peak_rss_bytes)

    def peer(self, read: list[float]) -> Sample:
        """Tokens a second of llama.cpp; appends the bytes that another few tokens read more."""
        few, more = self._peer(2), self._peer(6)
        read.append((more.read_bytes - few.read_bytes) / 4 / MIB)
        return Sample(llama.only(more)["avg_ts"], more.peak_rss_bytes)

    def _peer(self, tokens: int) -> Finished:
        forget(self.gguf)
        tool = self.asked.installs.llama("llama-bench")
        words = ["-m", self.gguf, "-t", self.asked.threads, "-p", 0, "-n", tokens, "-r", 1, "-o", "jsonl"]
        return self.limit.run([tool, *words])

    def streamed(self, batch: int, weights: list[float]) -> Sample:
        """10⁹ bytes a second from disk while `batch` sequences generate."""
        sizes = ["--context", 16, "--batch", batch, "-n", self.tokens, "--repeat", 1, "--json"]
        words = ["bench", "decode", self.bundle, "--memory", self.memory, *sizes]
        done = self.limit.run([self.asked.hearth.binary, *words, "--threads", self.asked.threads])
        found = json_lines(done.stdout)[-1]
        return Sample(found["tok_s"] / batch * statistics.median(weights) * MIB / 1e9)

    def disk(self) -> Sample:
        """10⁹ bytes a second that the disk gives."""
        folder = self.bundle.parent
        return Sample(self.asked.hearth.call("bench", "io", "--dir", folder, "--bytes", "1GiB")["read_gb_s"])


def compare(asked: Asked, report: Report, label: str) -> None:
    setting = Setting(asked, asked.models.gguf(label), asked.models.bundle(label, asked.hearth))
    ours: list[float] = []
    theirs: list[float] = []
    sides = {llama.NAME: lambda: setting.peer(theirs), "hearth": lambda: setting.generate(ours)}
    work = f"decode from disk, {label}, a quarter of it in memory"
    report.rows += rows_against(work, "tok/s", take_turns(sides, asked.rounds), PEER_BAR)
    report.rows.append(Row(f"{work}, read per token", "MiB", llama.NAME, ours, theirs, higher_is_better=False))
    report.peers[llama.NAME] = llama.VERSION
    for batch, part in BATCHES.items():
        limited = dataclasses.replace(setting, part=part)
        sides = {"disk": setting.disk, "hearth": lambda at=limited, batch=batch: at.streamed(batch, ours)}
        samples = take_turns(sides, asked.rounds)
        work = f"reading while decoding, {label}, 1/{part} of it in memory, batch {batch}"
        report.rows += rows_against(work, "GB/s", samples, DISK_BAR)


def main() -> None:
    options, report = asked(__doc__), Report()
    for label in BILLION:
        report.attempt(lambda label=label: compare(options, report, label))
    report.show(options.as_json)


if __name__ == "__main__":
    main()
