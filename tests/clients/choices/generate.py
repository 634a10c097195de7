"""Writes `questions.jsonl` and `expected.json`: what a multiple-choice task on the tiny chat model comes to when
transformers scores it directly. lm-eval must find the same through a server.

    python3 -m venv venv && venv/bin/pip install -r tests/fixtures/requirements.txt
    venv/bin/python tests/clients/choices/generate.py
"""

import json
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

HERE = Path(__file__).resolve().parent
MODEL = HERE.parents[1] / "fixtures" / "tiny-chat" / "model"

# A question, how its answer begins, and how that may go on: first as it is right. The model knows some, and of the others
# has no idea.
QUESTIONS = [
    ("What is the capital of France?", "The capital of France is", [" Paris.", " Rome.", " green."]),
    ("What is the capital of Italy?", "The capital of Italy is", [" Rome.", " Madrid.", " a tiny model."]),
    ("What is the capital of Spain?", "The capital of Spain is", [" Madrid.", " Paris.", " 1 2 3"]),
    ("What is the capital of Norway?", "The capital of Norway is", [" Oslo.", " Rome.", " Bergen."]),
    ("What is the capital of Japan?", "The capital of Japan is", [" Tokyo.", " Kyoto.", " Madrid."]),
    ("Who are you?", "I am", [" a tiny model.", " a big model.", " Paris."]),
    ("What colour is the sky?", "The sky is", [" blue.", " green.", " Paris."]),
    ("What colour is grass?", "Grass is", [" green.", " blue.", " a model."]),
    ("What colour is snow?", "Snow is", [" white.", " green.", " blue."]),
    ("Count to five.", "1 2 3", [" 4 5", " 4 6", " 2 1"]),
    ("Count to two.", "1", [" 2", " 1", " 2 3 4 5"]),
    ("Good night.", "Good night,", [" sleep well.", " Paris.", " help you?"]),
]
TURN = "<|im_start|>{}\n{}<|im_end|>\n"
# A lead smaller than this could be decided by rounding.
LEAD = 0.01


def context(question: str, begun: str) -> str:
    """A conversation up to a begun answer; no white space at its end, which lm-eval would move to the choices."""
    system = TURN.format("system", "You are a helpful assistant.")
    return system + TURN.format("user", question) + f"<|im_start|>assistant\n{begun}"


def score(tokenizer, model, before: str, choice: str) -> dict:
    """Log-likelihood of a choice and whether greedy decoding would write it, as lm-eval defines them."""
    whole, start = (tokenizer(text, add_special_tokens=False)["input_ids"] for text in (before + choice, before))
    assert whole[: len(start)] == start, choice
    with torch.no_grad():
        logits = model(torch.tensor([whole])).logits[0].double().log_softmax(-1)
    scored = whole[len(start) :]
    rows = logits[len(start) - 1 : -1]
    best = rows.topk(2).values
    assert float((best[:, 0] - best[:, 1]).min()) > 1e-4, ("which token is greedy is a matter of rounding", choice)
    return {
        "loglikelihood": round(sum(float(row[token]) for row, token in zip(rows, scored)), 6),
        "is_greedy": rows.argmax(-1).tolist() == scored,
    }


def main() -> None:
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    model = AutoModelForCausalLM.from_pretrained(MODEL, attn_implementation="eager").eval()
    questions, expected, right = [], [], 0
    for i, (question, begun, choices) in enumerate(QUESTIONS):
        # The right one stands at another place each time.
        gold = i % len(choices)
        choices = choices[1 : gold + 1] + choices[:1] + choices[gold + 1 :]
        before = context(question, begun)
        scores = [score(tokenizer, model, before, choice) for choice in choices]
        values = [s["loglikelihood"] for s in scores]
        best, second = sorted(values, reverse=True)[:2]
        assert best - second > LEAD, (question, values)
        right += values.index(best) == gold
        questions.append({"context": before, "choices": choices, "gold": gold})
        expected.append(scores)
    assert 0 < right < len(questions), "all or nothing says little"
    (HERE / "questions.jsonl").write_text("".join(json.dumps(q) + "\n" for q in questions))
    lines = ",\n".join("  " + json.dumps(scores) for scores in expected)
    (HERE / "expected.json").write_text(f'{{"accuracy": {right / len(questions)!r}, "scores": [\n{lines}\n]}}\n')
    print(f"{right} of {len(questions)} right")


if __name__ == "__main__":
    main()
