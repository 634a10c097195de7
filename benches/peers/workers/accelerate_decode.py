"""Generating with transformers, the weights that memory does not hold offloaded to disk by accelerate; prints one JSON object.

python accelerate_decode.py MODEL --memory BYTES --tokens 4 --threads 2 --folder DIR

The clock runs from the first token to the last; the first one, which reads everything too, is not counted. Bytes are those
that the process read from disk meanwhile, by the page cache's misses.
"""

import argparse
import json
import resource
import time

import torch
from transformers import AutoModelForCausalLM

PROMPT = [1, 2, 3, 4]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--memory", type=int, required=True, help="bytes of weights that stay in memory at most")
    parser.add_argument("--tokens", type=int, required=True)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--folder", required=True, help="where accelerate may put what it offloads")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    model = AutoModelForCausalLM.from_pretrained(
        given.model, device_map="auto", max_memory={"cpu": given.memory}, offload_folder=given.folder, dtype="auto"
    )
    places = list(model.hf_device_map.values())
    tokens = torch.tensor([PROMPT] * given.batch)
    cache = None
    with torch.inference_mode():
        for done in range(given.tokens):
            if done == 1:
                start, read = time.perf_counter(), resource.getrusage(resource.RUSAGE_SELF).ru_inblock
            out = model(tokens, past_key_values=cache, use_cache=True, logits_to_keep=1)
            cache, tokens = out.past_key_values, out.logits[:, -1:].argmax(-1)
    seconds = time.perf_counter() - start
    steps = given.tokens - 1
    found = {
        "tok_s": given.batch * steps / seconds,
        "read_bytes_per_pass": (resource.getrusage(resource.RUSAGE_SELF).ru_inblock - read) * 512 / steps,
        "on_disk": sum(place == "disk" for place in places),
        "modules": len(places),
        "dtype": str(model.dtype).removeprefix("torch."),
    }
    print(json.dumps(found))


if __name__ == "__main__":
    main()
