"""Training steps of torch + transformers (+ peft) on random tokens; prints one JSON object.

python torch_train.py MODEL full|checkpoint|lora f32|bf16 --batch 4 --seq 256 --steps 2 --threads 2
"""

import argparse
import json
import resource
import sys
import time

import torch
from transformers import AutoModelForCausalLM

MATRICES = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("how", choices=["full", "checkpoint", "lora"])
    parser.add_argument("dtype", choices=["f32", "bf16"])
    for name, default in (("batch", 4), ("seq", 256), ("steps", 2), ("threads", 2), ("rank", 16)):
        parser.add_argument(f"--{name}", type=int, default=default)
    return parser.parse_args()


def prepare(asked: argparse.Namespace) -> torch.nn.Module:
    dtype = torch.bfloat16 if asked.dtype == "bf16" else torch.float32
    model = AutoModelForCausalLM.from_pretrained(asked.model, dtype=dtype)
    model.config.use_cache = False
    if asked.how == "lora":
        from peft import LoraConfig, get_peft_model

        model = get_peft_model(model, LoraConfig(r=asked.rank, lora_alpha=2 * asked.rank, target_modules=MATRICES))
    if asked.how == "checkpoint":
        model.gradient_checkpointing_enable()
    return model.train()


def main() -> None:
    asked = arguments()
    torch.set_num_threads(asked.threads)
    torch.manual_seed(0)
    model = prepare(asked)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4)
    tokens = torch.randint(0, model.config.vocab_size, (asked.batch, asked.seq))
    rates = []
    for _ in range(asked.steps + 1):
        start = time.perf_counter()
        model(input_ids=tokens, labels=tokens).loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        rates.append(tokens.numel() / (time.perf_counter() - start))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    # The first step allocates the optimizer's state and is not measured.
    print(json.dumps({"samples": rates[1:], "peak_rss_bytes": peak}))


if __name__ == "__main__":
    main()
