"""What a quantized format costs: its perplexity beside that of its own values in f32, both computed by hearth.

Over a thousand tokens the two differ by chance by up to two percent either way; hence thousands of tokens of plain prose.
"""

import pathlib

from asked import Asked
from models import QUANTIZED
from turns import Report, Row

CONTEXT = 256
# What quantized weights multiply, and how far the perplexity may be from the reference.
KINDS = {"f32": 1.001, "int8": 1.01}


def beside(asked: Asked, report: Report) -> None:
    """Rows for every format of SmolLM2."""
    text = asked.text or asked.installs.text()
    for label, (base, _, _) in QUANTIZED.items():
        if base == "smollm2":
            report.attempt(lambda label=label: compare(asked, report, label, text))


def compare(asked: Asked, report: Report, label: str, text: pathlib.Path) -> None:
    asked.hearth.needs(["eval"], "--activations")
    tokens = (16 if asked.quick else 32) * CONTEXT
    sizes = ["--perplexity", text, "--context", CONTEXT, "--tokens", tokens]

    def perplexity(model: object, *options: str) -> float:
        return asked.hearth.call("eval", model, *sizes, *options)["perplexity"]

    reference = perplexity(asked.models.dequantized(label, asked.hearth))
    for kind, bar in KINDS.items():
        found = perplexity(asked.models.gguf(label), "--activations", kind)
        work = f"perplexity, {label}, {kind} activations"
        row = Row(work, "", "dequantized", [found], [reference], bar, higher_is_better=False)
        report.rows.append(row)
