"""Reading a prompt of 512 tokens: hearth against llama.cpp on the same GGUF file, and against CTranslate2 in int8.

    python benches/peers/prefill.py target/release/hearth [--rounds 5] [--json]

The bar holds against the better of the two. CTranslate2 reads the same weights in a format of its own.
"""

from collections.abc import Callable

import llama
from asked import Asked, asked
from models import FORMATS, WORKERS
from turns import Report, Sample, json_lines, rows_against, run, take_turns

TOKENS, BAR, CTRANSLATE2 = 512, 1.0, "CTranslate2 int8"


def ctranslate2(asked: Asked) -> Callable[[], Sample]:
    """How CTranslate2 is measured, once it is installed and its model is made."""
    model = asked.models.ctranslate2(asked.hearth)
    words = [asked.installs.python, WORKERS / "ctranslate2_prefill.py", model]

    def measure() -> Sample:
        done = run([*words, "--tokens", TOKENS, "--threads", asked.threads])
        return Sample(json_lines(done.stdout)[-1]["samples"][0], done.peak_rss_bytes)

    return measure


def compare(asked: Asked, report: Report, label: str, others: dict[str, Callable[[], Sample]]) -> None:
    model = asked.models.gguf(label)
    sides = {
        llama.NAME: lambda: llama.bench(asked, model, prompt=TOKENS),
        # The wide shape is another model, which CTranslate2 is not given.
        **({} if "wide shape" in label else others),
        "hearth": lambda: asked.hearth.bench("prefill", model, "--tokens", TOKENS, "--repeat", 1),
    }
    bar = BAR if label != "F16" else None
    samples = take_turns(sides, asked.rounds)
    report.rows += rows_against(f"prefill {TOKENS}, {label}", "tok/s", samples, bar)
    report.peers[llama.NAME] = llama.VERSION


def main() -> None:
    options, report = asked(__doc__), Report()
    others: dict[str, Callable[[], Sample]] = {}

    def add_ctranslate2() -> None:
        others[CTRANSLATE2] = ctranslate2(options)
        report.peers |= options.installs.need("ctranslate2")

    report.attempt(add_ctranslate2)
    for label in FORMATS:
        report.attempt(lambda label=label: compare(options, report, label, others))
    report.show(options.as_json)


if __name__ == "__main__":
    main()
