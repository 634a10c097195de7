"""From start to first token: `hearth generate -n 1` against llama.cpp's CLI on the same Q8_0 file, time and memory.

    python benches/peers/startup.py target/release/hearth [--rounds 5] [--json]

Whole processes are timed, from their start to their end, with the file in the page cache. llama.cpp is spared its
warm-up run.
"""

import llama
from asked import Asked, asked
from turns import Finished, Report, Sample, memory_row, rows_against, run, take_turns

BAR, PROMPT, LABEL = 1.0, "The quick brown fox", "Q8_0"


def sample(done: Finished) -> Sample:
    return Sample(done.seconds * 1e3, done.peak_rss_bytes)


def compare(asked: Asked, report: Report) -> None:
    model = asked.models.gguf(LABEL)
    words = [asked.hearth.binary, "generate", model, "--prompt", PROMPT, "-n", 1]
    environment = {"RAYON_NUM_THREADS": str(asked.threads)}
    sides = {
        llama.NAME: lambda: sample(llama.first_token(asked, model, PROMPT)),
        "hearth": lambda: sample(run(words, environment)),
    }
    # The first turn brings the file into the page cache for both.
    take_turns(sides, 1)
    samples = take_turns(sides, 2 * asked.rounds)
    work = f"start to first token, {LABEL}"
    report.rows += rows_against(work, "ms", samples, BAR, higher_is_better=False)
    report.rows.append(memory_row(work, samples, llama.NAME, None))
    report.peers[llama.NAME] = llama.VERSION


def main() -> None:
    options, report = asked(__doc__), Report()
    report.attempt(lambda: compare(options, report))
    report.show(options.as_json)


if __name__ == "__main__":
    main()
