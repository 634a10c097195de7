"""Generating token after token, one sequence: hearth against llama.cpp on the same GGUF file.

    python benches/peers/decode.py target/release/hearth [--perplexity TEXT] [--rounds 5] [--json]

Each round runs `llama-bench -n 128 -d DEPTH` and `hearth bench decode --context DEPTH` once, at an empty context and
512 tokens deep.
"""

import accuracy
import llama
from asked import Asked, asked
from models import FORMATS
from turns import Report, rows_against, take_turns

BARS = {0: 1.2, 512: 1.4}


def compare(asked: Asked, report: Report, label: str, depth: int) -> None:
    asked.hearth.needs(["bench", "decode"], "--context")
    model, tokens = asked.models.gguf(label), 32 if asked.quick else 128
    sizes = ["--context", depth, "-n", tokens, "--repeat", 1]
    sides = {
        llama.NAME: lambda: llama.bench(asked, model, generate=tokens, depth=depth),
        "hearth": lambda: asked.hearth.bench("decode", model, *sizes),
    }
    where = f"{depth} deep" if depth else "empty context"
    # F16 stands beside the quantized formats for orientation; the bars are theirs.
    bar = BARS[depth] if label != "F16" else None
    samples = take_turns(sides, asked.rounds)
    report.rows += rows_against(f"decode, {label}, {where}", "tok/s", samples, bar)
    report.peers[llama.NAME] = llama.VERSION


def main() -> None:
    options, report = asked(__doc__), Report()
    for label in FORMATS:
        for depth in BARS:
            report.attempt(lambda label=label, depth=depth: compare(options, report, label, depth))
    accuracy.beside(options, report)
    report.show(options.as_json)


if __name__ == "__main__":
    main()
