"""Talks to a running server with the official OpenAI client, and scores continuations as lm-eval does.

Run by hand, not in CI (it needs Python packages):

    cargo run --release -- serve tests/fixtures/tiny-chat/model --port 8000
    python3 -m venv venv && venv/bin/pip install openai
    venv/bin/python crates/server/tests/clients/openai_client.py http://127.0.0.1:8000

Works with any chat model. A second argument is the API key. Prints one line per check and fails on the first that
does not hold.
"""

import json
import sys
import urllib.request

import openai

URL = sys.argv[1] if len(sys.argv) > 1 else "http://127.0.0.1:8000"
KEY = sys.argv[2] if len(sys.argv) > 2 else "none"
QUESTION = [{"role": "user", "content": "What is the capital of France?"}]

client = openai.OpenAI(base_url=URL + "/v1", api_key=KEY, max_retries=0)
model = client.models.list().data[0].id


def call(path, body=None):
    """A plain JSON request, for what the client library does not cover."""
    data = None if body is None else json.dumps(body).encode()
    headers = {"content-type": "application/json", "authorization": f"Bearer {KEY}"}
    with urllib.request.urlopen(urllib.request.Request(URL + path, data, headers)) as answer:
        return json.load(answer)


def check(name, holds, shown=""):
    print(f"{'ok  ' if holds else 'FAIL'} {name} {shown}")
    if not holds:
        sys.exit(1)


def models():
    check("models.retrieve", client.models.retrieve(model).id == model, model)


def chat():
    options = dict(model=model, messages=QUESTION, temperature=0, max_completion_tokens=40)
    whole = client.chat.completions.create(**options)
    choice = whole.choices[0]
    check("chat", choice.message.content and choice.finish_reason in ("stop", "length"), repr(choice.message.content))
    chunks = list(client.chat.completions.create(**options, stream=True, stream_options={"include_usage": True}))
    text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    check("chat, streamed, is the same text", text == choice.message.content)
    check("the role comes with the first token", chunks[0].choices[0].delta.role == "assistant")
    check("finish_reason is null until the end", [c.choices[0].finish_reason for c in chunks[:-1]]
          == [None] * (len(chunks) - 2) + [choice.finish_reason])
    check("the last chunk has the usage", chunks[-1].choices == [] and chunks[-1].usage == whole.usage,
          whole.usage.model_dump_json(exclude_none=True))
    parts = [{"role": "user", "content": [{"type": "text", "text": QUESTION[0]["content"]}]}]
    again = client.chat.completions.create(**{**options, "messages": parts})
    check("typed parts", again.choices[0].message.content == choice.message.content)


def chat_logprobs():
    out = client.chat.completions.create(
        model=model, messages=QUESTION, temperature=0, max_tokens=5, logprobs=True, top_logprobs=3)
    content = out.choices[0].logprobs.content
    check("chat logprobs", len(content) == out.usage.completion_tokens
          and all(t.top_logprobs[0].logprob == t.logprob and bytes(t.bytes) for t in content),
          [(t.token, round(t.logprob, 4)) for t in content])


def completions():
    options = dict(model=model, prompt="What is the", temperature=0, max_tokens=12)
    whole = client.completions.create(**options)
    check("completions", whole.usage.completion_tokens <= 12, repr(whole.choices[0].text))
    streamed = client.completions.create(**options, stream=True)
    check("completions, streamed, is the same text", "".join(c.choices[0].text for c in streamed) == whole.choices[0].text)
    batch = client.completions.create(**{**options, "prompt": ["What is the", "Hello", "What is the"]}, n=2, seed=1)
    check("a batch of prompts", [c.index for c in batch.choices] == list(range(6))
          and batch.choices[0].text == batch.choices[4].text == whole.choices[0].text)
    echo = client.completions.create(**{**options, "max_tokens": 0}, echo=True, logprobs=2)
    logprobs = echo.choices[0].logprobs
    check("echo with prompt logprobs", echo.choices[0].text == "What is the" and logprobs.token_logprobs[0] is None
          and len(logprobs.tokens) == echo.usage.prompt_tokens, list(zip(logprobs.tokens, logprobs.token_logprobs)))
    stopped = client.completions.create(**options, stop=[whole.choices[0].text[3:5]])
    check("stop", whole.choices[0].text.startswith(stopped.choices[0].text)
          and stopped.choices[0].finish_reason == "stop", repr(stopped.choices[0].text))


def errors():
    for name, error, options in [
        ("temperature 9", openai.BadRequestError, dict(model=model, prompt="x", temperature=9)),
        ("unknown model", openai.NotFoundError, dict(model="no-such-model", prompt="x")),
        ("a token id too large", openai.BadRequestError, dict(model=model, prompt=[10**9])),
        ("a context too long", openai.BadRequestError, dict(model=model, prompt="x", max_tokens=10**9)),
    ]:
        try:
            client.completions.create(**options)
            check(name, False)
        except error as caught:
            check(name, caught.body["message"], f"{caught.status_code} {caught.body['message']}")


def harness():
    """lm-eval's `local-completions`: remote tokenizer, then a batch of token ids scored through `echo`."""
    info = call("/tokenizer_info")
    check("tokenizer_info", info["eos_token"], repr(info["eos_token"]))
    def tokenize(text):
        return call("/tokenize", {"prompt": text, "add_special_tokens": False})["tokens"]
    check("tokenize and back", call("/detokenize", {"tokens": tokenize("two words")})["prompt"] == "two words")
    context = call("/tokenize", {"messages": QUESTION})["tokens"]
    answer = client.chat.completions.create(model=model, messages=QUESTION, temperature=0, max_tokens=40)
    continuations = [tokenize(answer.choices[0].message.content), tokenize(" zebra quartz")]
    out = call("/v1/completions", {
        "model": model, "prompt": [context + c for c in continuations], "max_tokens": 1, "logprobs": 1,
        "echo": True, "temperature": 0, "seed": 1234})
    results = []
    for choice in sorted(out["choices"], key=lambda choice: choice["index"]):
        logprobs = choice["logprobs"]
        scored = logprobs["token_logprobs"][len(context):-1]
        top = logprobs["top_logprobs"][len(context):-1]
        results.append((sum(scored), all(own == max(t.values()) for own, t in zip(scored, top))))
        check("one entry per token and one more", len(scored) == len(continuations[choice["index"]]))
    check("the model's own answer is greedy and likelier", results[0][1] and not results[1][1]
          and results[0][0] > results[1][0], results)


for step in (models, chat, chat_logprobs, completions, errors, harness):
    step()
print("all checks hold")
