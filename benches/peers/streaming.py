"""Generating with a model four times larger than memory: hearth's streaming against llama.cpp's mmap, accelerate and the disk.

    python benches/peers/streaming.py target/release/hearth [--format q8_0] [--format f32] [--rounds 5] [--json]

Every process runs in a memory cgroup of a quarter of the model's size (a third for 32 sequences, whose KV cache is
larger); hearth is told so with `--memory`. Decoding is also held against b·B/W: what `b` sequences get if a step takes no
longer than the disk needs for the streamed bytes, its speed measured in turn (`hearth bench io`). transformers with
accelerate's disk offload has no 8-bit file: it gets the same model in f16 where the others have Q8_0, and a quarter of
that, twice their memory. Needs a cgroup that may be written, so mostly root; f32 takes 14 GB of disk while its models are there.
"""

import argparse
import dataclasses
import functools
import pathlib
import tempfile

import llama
from asked import Asked, asked
from limit import Limit, forget
from models import WORKERS
from turns import MIB, Finished, Report, Row, Sample, json_lines, rows_against, take_turns

PEER_BAR, DISK_BAR = 2.0, 0.9
# Sequences at once, and which part of the model's size is memory.
BATCHES = {1: 4, 8: 4, 32: 3}
FORMATS = {"q8_0": "1.1B Q8_0", "f32": "1.1B f32"}
ACCELERATE = ("torch", "transformers", "accelerate", "safetensors")


@dataclasses.dataclass(frozen=True)
class Setting:
    """One model in `1 / part` of its size."""

    asked: Asked
    label: str
    part: int = 4

    @functools.cached_property
    def gguf(self) -> pathlib.Path:
        return self.asked.models.gguf(self.label)

    @functools.cached_property
    def bundle(self) -> pathlib.Path:
        return self.asked.models.bundle(self.label, self.asked.hearth)

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

    def llama(self, read: list[float]) -> Sample:
        """Tokens a second of llama.cpp; appends the bytes that another few tokens read more."""
        few, more = self._llama(2), self._llama(6)
        read.append((more.read_bytes - few.read_bytes) / 4 / MIB)
        return Sample(llama.only(more)["avg_ts"], more.peak_rss_bytes)

    def _llama(self, tokens: int) -> Finished:
        forget(self.gguf)
        tool = self.asked.installs.llama("llama-bench")
        words = ["-m", self.gguf, "-t", self.asked.threads, "-p", 0, "-n", tokens, "-r", 1, "-o", "jsonl"]
        return self.limit.run([tool, *words])

    def accelerate(self, read: list[float]) -> Sample:
        """Tokens a second of transformers with weights offloaded to disk; appends the bytes read per token."""
        model = self.asked.models.offloadable(self.label, self.asked.hearth)
        forget(model)
        limit = Limit(sum(file.stat().st_size for file in model.glob("*.safetensors")) // self.part)
        sizes = ["--memory", limit.limit_bytes // 4, "--tokens", 3 if self.asked.quick else 5]
        with tempfile.TemporaryDirectory(dir=model.parent) as folder:
            words = [self.asked.installs.python, WORKERS / "accelerate_decode.py", model, "--folder", folder]
            done = limit.run([*words, *sizes, "--threads", self.asked.threads])
        found = json_lines(done.stdout)[-1]
        read.append(found["read_bytes_per_pass"] / MIB)
        return Sample(found["tok_s"], done.peak_rss_bytes)

    @functools.cached_property
    def streamed_bytes(self) -> int:
        """What every step reads from disk."""
        return self.asked.hearth.call("plan", "--serve", self.bundle, "--memory", self.memory)["nvme_bytes"]

    def decode(self, batch: int) -> Sample:
        """Tokens a second of `batch` sequences together."""
        forget(self.bundle)
        sizes = ["--context", 16, "--batch", batch, "-n", self.tokens, "--repeat", 1, "--json"]
        words = ["bench", "decode", self.bundle, "--memory", self.memory, *sizes]
        done = self.limit.run([self.asked.hearth.binary, *words, "--threads", self.asked.threads])
        return Sample(json_lines(done.stdout)[-1]["tok_s"])

    def promised(self, batch: int) -> Sample:
        """b·B/W."""
        folder = self.bundle.parent
        disk = self.asked.hearth.call("bench", "io", "--dir", folder, "--bytes", "1GiB")["read_gb_s"]
        return Sample(batch * disk * 1e9 / self.streamed_bytes)


def against_llama(setting: Setting, report: Report) -> None:
    ours: list[float] = []
    theirs: list[float] = []
    sides = {llama.NAME: lambda: setting.llama(theirs), "hearth": lambda: setting.generate(ours)}
    work = f"decode from disk, {setting.label}, a quarter of it in memory"
    report.rows += rows_against(work, "tok/s", take_turns(sides, setting.asked.rounds), PEER_BAR)
    report.rows.append(Row(f"{work}, read per token", "MiB", llama.NAME, ours, theirs, higher_is_better=False))
    report.peers[llama.NAME] = llama.VERSION


def against_accelerate(setting: Setting, report: Report) -> None:
    versions = setting.asked.installs.need(*ACCELERATE)
    ours: list[float] = []
    theirs: list[float] = []
    sides = {"accelerate": lambda: setting.accelerate(theirs), "hearth": lambda: setting.generate(ours)}
    dtype = setting.asked.models.offloadable(setting.label, setting.asked.hearth).name[-3:]
    work = f"decode from disk, {setting.label} (accelerate: {dtype}), a quarter of it in memory"
    report.rows += rows_against(work, "tok/s", take_turns(sides, setting.asked.rounds), PEER_BAR)
    report.rows.append(Row(f"{work}, read per token", "MiB", "accelerate", ours, theirs, higher_is_better=False))
    report.peers.update(versions)


def against_disk(setting: Setting, report: Report, batch: int) -> None:
    sides = {"b·B/W": lambda: setting.promised(batch), "hearth": lambda: setting.decode(batch)}
    samples = take_turns(sides, setting.asked.rounds)
    work = f"decode from disk, {setting.label}, 1/{setting.part} of it in memory, batch {batch}"
    report.rows += rows_against(work, "tok/s", samples, DISK_BAR)


def compare(asked: Asked, report: Report, label: str) -> None:
    setting = Setting(asked, label)
    report.attempt(lambda: against_llama(setting, report))
    report.attempt(lambda: against_accelerate(setting, report))
    for batch, part in BATCHES.items():
        report.attempt(lambda batch=batch, part=part: against_disk(Setting(asked, label, part), report, batch))


def formats(parser: argparse.ArgumentParser) -> None:
    text = "of the model, several times for several [q8_0]"
    parser.add_argument("--format", choices=FORMATS, action="append", help=text)


def main() -> None:
    options, report = asked(__doc__, formats), Report()
    for name in options.own.format or ["q8_0"]:
        compare(options, report, FORMATS[name])
    report.show(options.as_json)


if __name__ == "__main__":
    main()
