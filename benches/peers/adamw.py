"""AdamW on the CPU: hearth against torch.optim.AdamW(fused=True), taking turns on the same machine.

    python benches/peers/adamw.py target/release/hearth [--parameters 64000000] [--rounds 5] [--threads N] [--json]

Installs torch (its CPU build) by pip if it is missing. Each round runs `hearth bench adam --json`, which reports the
seconds of each of its steps, and as many steps of torch; figures are medians over all of them. Both hold f32
parameters, gradients and moments (28 bytes moved per parameter). Give hearth's command other arguments after `--`.
"""

import argparse
import json
import os
import pathlib
import statistics
import subprocess
import sys
import time


def import_torch():
    try:
        import torch
    except ImportError:
        index = "https://download.pytorch.org/whl/cpu"
        pip = [sys.executable, "-m", "pip", "install", "--quiet"]
        if subprocess.run([*pip, "torch", "--index-url", index], check=False).returncode != 0:
            subprocess.run([*pip, "torch"], check=True)
        import torch
    return torch


def torch_steps(torch, parameters, steps):
    """Seconds of each step after one to warm up."""
    p = torch.nn.Parameter(torch.full((parameters,), 0.5))
    p.grad = torch.full((parameters,), 1e-3)
    optimizer = torch.optim.AdamW([p], lr=1e-4, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    optimizer.step()
    seconds = []
    for _ in range(steps):
        start = time.perf_counter()
        optimizer.step()
        seconds.append(time.perf_counter() - start)
    return seconds


def hearth_steps(binary, parameters, threads, extra):
    command = [binary, "bench", "adam", "--elements", str(parameters), "--compute", "f32", "--json", *extra]
    environment = {**os.environ, "RAYON_NUM_THREADS": str(threads)}
    run = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment)
    found = json.loads(run.stdout)
    # Samples are rates; what is compared is the time of a step.
    moved = found["bytes_per_parameter"] * parameters
    found["samples"] = [moved / (rate * 1e9) for rate in found["samples"]]
    return found


def spread(values):
    """Interquartile range over the median."""
    low, _, high = statistics.quantiles(values, n=4)
    return (high - low) / statistics.median(values)


def main():
    own, extra = sys.argv[1:], []
    if "--" in own:
        at = own.index("--")
        own, extra = own[:at], own[at + 1 :]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("binary", type=pathlib.Path, help="path of the hearth binary")
    parser.add_argument("--parameters", type=int, default=64_000_000)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args(own)
    torch = import_torch()
    torch.set_num_threads(args.threads)
    hearth, peer, shares = [], [], []
    for _ in range(args.rounds):
        found = hearth_steps(str(args.binary), args.parameters, args.threads, extra)
        hearth += found["samples"]
        shares.append(found["of_peak"])
        peer += torch_steps(torch, args.parameters, len(found["samples"]))
    medians = statistics.median(hearth), statistics.median(peer)
    result = {
        "parameters": args.parameters,
        "threads": args.threads,
        "torch": torch.__version__,
        "hearth_s": medians[0],
        "torch_s": medians[1],
        "ratio": medians[1] / medians[0],
        "hearth_spread": spread(hearth),
        "torch_spread": spread(peer),
        "hearth_of_stream": statistics.median(shares),
    }
    if args.json:
        print(json.dumps(result))
        return
    print(f"{args.parameters} parameters, {args.threads} threads, {len(hearth)} steps each, taking turns")
    for name, seconds, values in [("hearth", medians[0], hearth), ("torch", medians[1], peer)]:
        rate = 28 * args.parameters / seconds / 1e9
        print(f"{name:7} {seconds * 1e3:7.1f} ms  {rate:5.1f} GB/s  spread {spread(values):.0%}")
    print(f"hearth is {result['ratio']:.2f} times as fast as torch, {result['hearth_of_stream']:.0%} of a plain stream")


if __name__ == "__main__":
    main()
