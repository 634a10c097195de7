"""Running llama.cpp's own benchmarks."""

import pathlib

from asked import Asked
from installs import LLAMA
from turns import Finished, Missing, Sample, json_lines, run

NAME = "llama.cpp"
VERSION = LLAMA.replace("==", " ")


def bench(asked: Asked, model: pathlib.Path, *, prompt: int = 0, generate: int = 0, depth: int = 0) -> Sample:
    """Tokens a second of reading `prompt` or of generating `generate` tokens after `depth` untimed ones."""
    tool = asked.installs.llama("llama-bench")
    sizes = ["-p", prompt, "-n", generate, "-d", depth]
    done = run([tool, "-m", model, "-t", asked.threads, *sizes, "-r", 1, "-o", "jsonl"])
    return Sample(only(done)["avg_ts"], done.peak_rss_bytes)


def batched(asked: Asked, model: pathlib.Path, *, batch: int, depth: int, generate: int) -> Sample:
    """Tokens a second of all sequences together, generating `generate` tokens each after `depth`."""
    tool = asked.installs.llama("llama-batched-bench")
    sizes = ["-npp", depth, "-ntg", generate, "-npl", batch, "-c", batch * (depth + generate)]
    done = run([tool, "-m", model, "-t", asked.threads, *sizes, "--output-format", "jsonl"])
    return Sample(only(done)["speed_tg"], done.peak_rss_bytes)


def first_token(asked: Asked, model: pathlib.Path, prompt: str) -> Finished:
    """The whole life of a process that generates one token."""
    tool = asked.installs.llama("llama-completion")
    quiet = ["-no-cnv", "--no-warmup", "--no-display-prompt", "--temp", 0, "-n", 1]
    return run([tool, "-m", model, "-t", asked.threads, "-p", prompt, *quiet])


def only(done: Finished) -> dict[str, float]:
    found = json_lines(done.stdout)
    if len(found) != 1:
        raise Missing(f"llama.cpp printed {len(found)} results where one was due")
    return found[0]
