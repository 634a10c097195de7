"""Training steps: hearth against torch + transformers (+ peft), SmolLM2-135M, batch 4 of 256 tokens, AdamW.

    python benches/peers/train.py target/release/hearth [--rounds 5] [--json]

Each round runs one process of either side, which warms up for one step; memory is the peak resident
size of the process.
"""

import statistics
from collections.abc import Callable

from asked import Asked, asked
from models import WORKERS
from turns import Report, Row, Sample, json_lines, memory_row, rows_against, run, take_turns

TORCH = "torch"
BATCH, SEQ, RANK = 4, 256, 16
# What is trained: torch's word for it, hearth's options, bar of tokens/s, bar of memory.
WORKS = {
    "full fine-tuning step, f32": ("full", [], 1.15, 0.6),
    "full fine-tuning step with activation checkpointing, f32": ("checkpoint", ["--recompute"], None, None),
    f"LoRA step, r {RANK}, f32": ("lora", ["--lora", RANK], 1.3, None),
}


def torch(asked: Asked, how: str, dtype: str) -> Callable[[], Sample]:
    model, steps = asked.models.huggingface(asked.hearth), 1 if asked.quick else 2
    sizes = ["--batch", BATCH, "--seq", SEQ, "--steps", steps, "--threads", asked.threads, "--rank", RANK]
    words = [asked.installs.python, WORKERS / "torch_train.py", model, how, dtype, *sizes]
    environment = {"OMP_NUM_THREADS": str(asked.threads), "TOKENIZERS_PARALLELISM": "false"}

    def measure() -> Sample:
        found = json_lines(run(words, environment).stdout)[-1]
        return Sample(statistics.median(found["samples"]), found["peak_rss_bytes"])

    return measure


def hearth(asked: Asked, *options: object) -> Callable[[], Sample]:
    model, steps = asked.models.huggingface(asked.hearth), 1 if asked.quick else 2

    def measure() -> Sample:
        sizes = ["--batch", BATCH, "--seq", SEQ, "--steps", steps]
        found = asked.hearth.call("bench", "train", model, *sizes, *options)
        return Sample(statistics.median(found["samples"]), found["peak_rss_bytes"])

    return measure


def against_torch(asked: Asked, report: Report, work: str) -> None:
    how, options, bar, memory_bar = WORKS[work]
    asked.hearth.needs(["bench", "train"], *(word for word in options if str(word).startswith("--")))
    packages = ["torch", "transformers", *(["peft"] if how == "lora" else [])]
    report.peers |= asked.installs.need(*packages)
    sides = {TORCH: torch(asked, how, "f32"), "hearth": hearth(asked, *options)}
    samples = take_turns(sides, asked.rounds)
    report.rows += rows_against(work, "tok/s", samples, bar)
    report.rows.append(memory_row(work, samples, TORCH, memory_bar))


def in_half(asked: Asked, report: Report) -> None:
    """bf16 storage with moments in three types, against our own f32 and, for orientation, torch in bf16."""
    asked.hearth.needs(["bench", "train"], "--compute", "--state-dtype")
    work, own = "full fine-tuning step, bf16 storage", "hearth f32"
    report.peers |= asked.installs.need("torch", "transformers")
    moments = {work: "f32", f"{work}, moments as well": "bf16", f"{work}, moments in 8 bits": "f8"}
    sides = {name: hearth(asked, "--compute", "bf16", "--state-dtype", dtype) for name, dtype in moments.items()}
    samples = take_turns({own: hearth(asked)} | sides, asked.rounds)
    for name in moments:
        pair = {own: samples[own], "hearth": samples[name]}
        report.rows += rows_against(name, "tok/s", pair, 0.95)
        report.rows.append(memory_row(name, pair, own, 0.6))
    theirs = take_turns({TORCH: torch(asked, "full", "bf16")}, asked.rounds)[TORCH]
    values = [[s.value for s in taken] for taken in (samples[work], theirs)]
    report.rows.append(Row(work, "tok/s", f"{TORCH} bf16", *values))


def main() -> None:
    options, report = asked(__doc__), Report()
    for work in WORKS:
        report.attempt(lambda work=work: against_torch(options, report, work))
    report.attempt(lambda: in_half(options, report))
    report.show(options.as_json)


if __name__ == "__main__":
    main()
