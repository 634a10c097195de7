"""Generating for 8 and for 32 sequences at once: hearth against llama.cpp on the same GGUF file.

    python benches/peers/batch.py target/release/hearth [--rounds 5] [--json]

Each round runs `llama-batched-bench -npp 128 -npl B` and `hearth bench decode --batch B --context 128` once; the figure
is the tokens of all sequences together.
"""

import llama
from asked import Asked, asked
from models import FORMATS
from turns import Report, rows_against, take_turns

BAR, DEPTH = 1.5, 128


def compare(asked: Asked, report: Report, label: str, batch: int) -> None:
    asked.hearth.needs(["bench", "decode"], "--context", "--batch")
    model, tokens = asked.models.gguf(label), 8 if asked.quick else 32
    sizes = ["--batch", batch, "--context", DEPTH, "-n", tokens, "--repeat", 1]
    sides = {
        llama.NAME: lambda: llama.batched(asked, model, batch=batch, depth=DEPTH, generate=tokens),
        "hearth": lambda: asked.hearth.bench("decode", model, *sizes),
    }
    bar = BAR if label != "F16" else None
    samples = take_turns(sides, asked.rounds)
    report.rows += rows_against(f"decode, {label}, batch {batch}, {DEPTH} deep", "tok/s", samples, bar)
    report.peers[llama.NAME] = llama.VERSION


def main() -> None:
    options, report = asked(__doc__), Report()
    for label in FORMATS:
        for batch in (8, 32):
            report.attempt(lambda label=label, batch=batch: compare(options, report, label, batch))
    report.show(options.as_json)


if __name__ == "__main__":
    main()
