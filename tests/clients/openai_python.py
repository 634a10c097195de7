"""Talks to a running server with the official OpenAI client.

    python openai_python.py http://127.0.0.1:8000 [API key]

Works with any chat model; tools need one whose calls the server can read. Prints one line per check and fails on the
first that does not hold.
"""

import json

import openai
from checks import KEY, QUESTION, URL, call, check

client = openai.OpenAI(base_url=URL + "/v1", api_key=KEY, max_retries=0)
model = client.models.list().data[0].id


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
    check("the last chunk has the usage", chunks[-1].choices == [] and chunks[-1].usage.total_tokens == whole.usage.total_tokens,
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


def sampled():
    options = dict(model=model, prompt="What is the", max_tokens=8, temperature=0.8, n=2, seed=1)
    first, again = (client.completions.create(**options, logprobs=2) for _ in range(2))
    check("seeds", [c.text for c in first.choices] == [c.text for c in again.choices], [c.text for c in first.choices])
    best = client.completions.create(**options, extra_body={"best_of": 4})
    check("best_of", len(best.choices) == 2)


def embeddings():
    texts = ["A cat sat.", "A cat sat here.", "1 2 3 4 5"]
    # The client asks for base64 and decodes it.
    out = client.embeddings.create(model=model, input=texts)
    plain = client.embeddings.create(model=model, input=texts, encoding_format="float")
    vectors = [row.embedding for row in out.data]
    check("embeddings", vectors == [row.embedding for row in plain.data] and out.usage.prompt_tokens > 0, len(vectors[0]))

    def similarity(a, b):
        return sum(x * y for x, y in zip(a, b))
    check("like texts are alike", similarity(vectors[0], vectors[1]) > similarity(vectors[0], vectors[2]))
    short = client.embeddings.create(model=model, input=[[1, 2, 3], [4]], dimensions=8, encoding_format="float")
    check("embeddings of token ids", [len(row.embedding) for row in short.data] == [8, 8])


CITY = {"type": "object", "properties": {"city": {"enum": ["Rome", "Paris"]}, "capital": {"type": "boolean"}},
        "required": ["city", "capital"], "additionalProperties": False}


def formats():
    schema = {"type": "json_schema", "json_schema": {"name": "city", "schema": CITY, "strict": True}}
    options = dict(model=model, messages=QUESTION, temperature=0, max_tokens=100)
    out = client.chat.completions.create(**options, response_format=schema)
    found = json.loads(out.choices[0].message.content)
    check("a JSON schema", set(found) == {"city", "capital"} and found["city"] in ("Rome", "Paris"), found)
    chunks = client.chat.completions.create(**options, response_format=schema, stream=True)
    text = "".join(c.choices[0].delta.content or "" for c in chunks)
    check("a JSON schema, streamed", text == out.choices[0].message.content)
    choice = client.chat.completions.create(**options, extra_body={"guided_choice": ["London", "Paris", "Berlin"]})
    check("guided_choice", choice.choices[0].message.content in ("London", "Paris", "Berlin"))


def tools():
    tool = {"type": "function", "function": {"name": "weather", "description": "Weather of a city", "parameters": {
        **CITY, "properties": {"city": CITY["properties"]["city"]}, "required": ["city"]}}}
    options = dict(model=model, messages=QUESTION, tools=[tool], temperature=0, max_tokens=120)
    out = client.chat.completions.create(**options, tool_choice="required", parallel_tool_calls=False)
    calls = out.choices[0].message.tool_calls
    check("tools", len(calls) == 1 and calls[0].function.name == "weather" and calls[0].id
          and json.loads(calls[0].function.arguments)["city"] in ("Rome", "Paris"), calls[0].function)
    named = {"type": "function", "function": {"name": "weather"}}
    with client.chat.completions.stream(**options, tool_choice=named) as stream:
        events = list(stream)
        last = stream.get_final_completion().choices[0].message.tool_calls[0].function
    check("tools, streamed", events and json.loads(last.arguments)["city"] in ("Rome", "Paris"), last)
    answered = [*QUESTION, {"role": "assistant", "content": "", "tool_calls": [calls[0].model_dump()]}]
    again = client.chat.completions.create(**{**options, "messages": [*answered, QUESTION[0]], "tools": []})
    check("calls in the conversation", again.choices[0].message.content is not None)


def errors():
    for name, error, options in [
        ("no prompt", openai.BadRequestError, dict(model=model, prompt="")),
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


for step in (models, chat, chat_logprobs, completions, sampled, embeddings, formats, tools, errors, harness):
    step()
print("all checks hold")
