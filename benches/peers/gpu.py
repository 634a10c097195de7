"""PyTorch and transformers on the card at hand, for the table that `hearth gpu bench` begins: copies, decoding and training
steps of Llama-shaped models with random weights, batch 1 and bf16.

    python3 gpu.py [--device cuda] [--tiny] [--out FOLDER]

Travels alone to GPU machines (`cargo xtask gpu`): needs torch and transformers there and nothing of this repository.
Writes peers.json and adds a table to gpu.md in FOLDER.
"""

import argparse
import json
import statistics
import sys
import time
from pathlib import Path

# Name: hidden, inner, heads, KV heads, layers, vocabulary; those of `crates/gpu/src/bench/decoding.rs`.
MODELS = {
    "135M": (576, 1536, 9, 3, 30, 49152),
    "1.1B": (2048, 5632, 32, 4, 22, 32000),
    "3B": (3072, 8192, 24, 8, 28, 128256),
    "8B": (4096, 14336, 32, 8, 32, 128256),
}
TINY = {"tiny": (64, 96, 8, 4, 2, 96)}
# Training takes 16 bytes a parameter and activations: the largest is left out.
TRAINED = ("135M", "1.1B", "tiny")


def median_seconds(torch, device, work, runs):
    """Median time of a run, after one that does not count."""
    wait = torch.cuda.synchronize if device.startswith("cuda") else lambda: None
    times = []
    for _ in range(runs + 1):
        wait()
        start = time.perf_counter()
        work()
        wait()
        times.append(time.perf_counter() - start)
    return statistics.median(times[1:])


def copy(torch, device, tiny):
    """Bytes per second within the card, read and written both counted."""
    length = 1 << (16 if tiny else 30)
    x = torch.zeros(length, dtype=torch.uint8, device=device)
    y = torch.empty_like(x)
    return 2 * length / median_seconds(torch, device, lambda: y.copy_(x), 3 if tiny else 15)


def llama(torch, device, shape):
    from transformers import LlamaConfig, LlamaForCausalLM

    hidden, inner, heads, kv_heads, layers, vocab = shape
    config = LlamaConfig(
        hidden_size=hidden, intermediate_size=inner, num_attention_heads=heads, num_key_value_heads=kv_heads,
        num_hidden_layers=layers, vocab_size=vocab, tie_word_embeddings=False, attn_implementation="sdpa",
    )
    with torch.device(device):
        return LlamaForCausalLM(config).to(torch.bfloat16)


def decode(torch, device, shape, tiny):
    """Tokens per second of `generate`, greedy, from a prompt of 128."""
    model, prompt, new = llama(torch, device, shape).eval(), 8 if tiny else 128, 4 if tiny else 128
    ids = torch.randint(0, shape[-1], (1, prompt), device=device)
    settings = {"do_sample": False, "pad_token_id": 0, "eos_token_id": None}

    def generate(count):
        with torch.inference_mode():
            model.generate(ids, max_new_tokens=count, min_new_tokens=count, **settings)

    runs = 1 if tiny else 3
    # What one token costs is the difference: the prompt is no part of it.
    seconds = median_seconds(torch, device, lambda: generate(new + 1), runs)
    seconds -= median_seconds(torch, device, lambda: generate(1), runs)
    return new / max(seconds, 1e-9)


def train(torch, device, shape, tiny):
    """Tokens per second of bf16 steps with fused attention and AdamW."""
    model = llama(torch, device, shape).train()
    fused = device.startswith("cuda")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=fused)
    batch, length = (1, 16) if tiny else (8, 1024)
    ids = torch.randint(0, shape[-1], (batch, length), device=device)

    def step():
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return batch * length / median_seconds(torch, device, step, 1 if tiny else 10)


def measure(torch, device, tiny):
    """Rows: what, a figure, its unit; and a sentence for each that failed."""
    rows, notes = [("copy within the card", copy(torch, device, tiny) / 1e9, "GB/s")], []
    for name, shape in (TINY if tiny else MODELS).items():
        for what, work in (("decoding", decode), ("training", train)):
            if work is train and name not in TRAINED:
                continue
            try:
                rows.append((f"{what} {name} in bf16", work(torch, device, shape, tiny), "tokens/s"))
            except (RuntimeError, ValueError, TypeError) as error:
                notes.append(f"{what} {name}: {str(error).splitlines()[0]}")
            if device.startswith("cuda"):
                torch.cuda.empty_cache()
    return rows, notes


def render(versions, rows, notes, tiny):
    """The table for people."""
    warning = " Tiny sizes: the figures mean nothing." if tiny else ""
    lines = [f"The same card with {versions}.{warning}", "", "| peer | figure |", "|---|---|"]
    lines += [f"| {what} | {figure:,.1f} {unit} |" for what, figure, unit in rows]
    lines += [f"\nLeft out: {note}." for note in notes]
    return "\n".join(lines) + "\n"


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    try:
        import torch
        import transformers
    except ImportError as error:
        sys.exit(f"peers are left out: {error}; pip install torch transformers")
    if options.device.startswith("cuda") and not torch.cuda.is_available():
        sys.exit("peers are left out: this torch finds no card")
    torch.manual_seed(0)
    versions = f"torch {torch.__version__}, transformers {transformers.__version__}"
    rows, notes = measure(torch, options.device, options.tiny)
    text = render(versions, rows, notes, options.tiny)
    print(text)
    if options.out:
        options.out.mkdir(parents=True, exist_ok=True)
        found = {"versions": versions, "tiny": options.tiny, "notes": notes}
        found["rows"] = [{"what": what, "figure": figure, "unit": unit} for what, figure, unit in rows]
        (options.out / "peers.json").write_text(json.dumps(found, indent=2) + "\n")
        with open(options.out / "gpu.md", "a", encoding="utf-8") as page:
            page.write("\n" + text)


if __name__ == "__main__":
    main()
