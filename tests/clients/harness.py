"""lm-eval's `local-completions` against a running server of the tiny chat model: a multiple-choice task must come out as
transformers computes it directly (`choices/generate.py`).

    python harness.py http://127.0.0.1:8000 [API key]
"""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from checks import KEY, URL, call, check

CHOICES = Path(__file__).resolve().parent / "choices"
TASK = "tiny_choices"
# Sums of log-probabilities of a few tokens, each rounded in f32 on both sides.
TOLERANCE = 1e-4


def evaluate(folder: Path) -> tuple[dict, list[dict]]:
    """Accuracy and samples of the task as lm-eval finds them."""
    task = {
        "task": TASK,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(CHOICES / "questions.jsonl")}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "context",
        "doc_to_choice": "choices",
        "doc_to_target": "gold",
        "target_delimiter": "",
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    }
    # JSON is YAML.
    (folder / f"{TASK}.yaml").write_text(json.dumps(task))
    model = call("/v1/models")["data"][0]["id"]
    options = {"model": model, "base_url": f"{URL}/v1/completions", "tokenizer_backend": "remote", "max_length": 512,
               "num_concurrent": 4, "auth_token": KEY}
    words = [sys.executable, "-m", "lm_eval", "run", "--model", "local-completions", "--batch_size", "4",
             "--model_args", ",".join(f"{key}={value}" for key, value in options.items()),
             "--tasks", TASK, "--include_path", folder, "--output_path", folder / "out", "--log_samples"]
    settings = {"OPENAI_API_KEY": KEY, "HF_HUB_OFFLINE": "1", "HF_HOME": str(folder / "hf"), "TOKENIZERS_PARALLELISM": "0"}
    done = subprocess.run(words, env={**os.environ, **settings}, capture_output=True, text=True, check=False)
    check("lm-eval runs", done.returncode == 0, "" if done.returncode == 0 else done.stderr[-3000:])
    [results] = (folder / "out").rglob("results_*.json")
    [samples] = (folder / "out").rglob("samples_*.jsonl")
    lines = [json.loads(line) for line in samples.read_text().splitlines()]
    return json.loads(results.read_text())["results"][TASK], sorted(lines, key=lambda line: line["doc_id"])


def main() -> None:
    expected = json.loads((CHOICES / "expected.json").read_text())
    with tempfile.TemporaryDirectory() as folder:
        results, samples = evaluate(Path(folder))
    check("accuracy as computed directly", results["acc,none"] == expected["accuracy"], results["acc,none"])
    check("every question is asked", len(samples) == len(expected["scores"]))
    found = [resp for sample in samples for resp in sample["filtered_resps"]]
    scores = [score for question in expected["scores"] for score in question]
    greedy = [str(is_greedy) for _, is_greedy in found]
    check("greedy or not", greedy == [str(score["is_greedy"]) for score in scores], f"{greedy.count('True')} are")
    worst = max(abs(float(value) - score["loglikelihood"]) for (value, _), score in zip(found, scores, strict=True))
    check("log-likelihoods as computed directly", worst < TOLERANCE, f"differ by at most {worst:.1e}")


main()
print("all checks hold")
