"""Reading a prompt with CTranslate2 in int8; prints one JSON object.

python ctranslate2_prefill.py MODEL --tokens 512 --threads 2
"""

import argparse
import json
import pathlib
import time

import ctranslate2


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("model", type=pathlib.Path)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--threads", type=int, default=2)
    asked = parser.parse_args()
    options = {"compute_type": "int8", "intra_threads": asked.threads, "inter_threads": 1}
    generator = ctranslate2.Generator(str(asked.model), device="cpu", **options)
    vocabulary = json.loads((asked.model / "vocabulary.json").read_text())
    prompt = [vocabulary[3 + 17 * i % 40_000] for i in range(asked.tokens)]
    rates = []
    for _ in range(2):
        start = time.perf_counter()
        # One token: the prompt is read and the head is applied to its last position alone, as when serving.
        generator.generate_batch([prompt], max_length=1, include_prompt_in_result=False)
        rates.append(asked.tokens / (time.perf_counter() - start))
    print(json.dumps({"samples": rates[1:]}))


if __name__ == "__main__":
    main()
