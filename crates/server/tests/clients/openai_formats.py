"""A running server through openai-python: python openai_formats.py http://127.0.0.1:8080 [tools]

Prints what came back; ends with an exception where the client could not read it. With a second argument it also asks for
tool calls, which needs a model whose chat template takes tools.
"""
import json, sys
from openai import OpenAI, BadRequestError, NotFoundError
c = OpenAI(base_url=sys.argv[1] + "/v1", api_key="x", max_retries=0)
m = c.models.list().data[0].id
msgs = [{"role": "user", "content": "What is the capital of France?"}]
r = c.chat.completions.create(model=m, messages=msgs, temperature=0, max_tokens=30)
print("chat", r.choices[0].message.content, r.usage)
print("stream", "".join(x.choices[0].delta.content or "" for x in c.chat.completions.create(model=m, messages=msgs, temperature=0, max_tokens=30, stream=True, stream_options={"include_usage": True}) if x.choices))
e = c.embeddings.create(model=m, input=["A cat sat.", "A kitten sat.", "Interest rates rose."])
v = [d.embedding for d in e.data]
dot = lambda a, b: sum(x * y for x, y in zip(a, b))
print("embeddings", len(v[0]), dot(v[0], v[1]), dot(v[0], v[2]), e.usage)
e2 = c.embeddings.create(model=m, input=[[1, 2, 3]], dimensions=8, encoding_format="float")
print("dims", len(e2.data[0].embedding))
schema = {"type": "object", "properties": {"city": {"type": "string"}, "population": {"type": "integer"}, "capital": {"type": "boolean"}}, "required": ["city", "population", "capital"], "additionalProperties": False}
r = c.chat.completions.create(model=m, messages=[{"role": "user", "content": "Describe Paris as JSON."}], temperature=0, max_tokens=100, response_format={"type": "json_schema", "json_schema": {"name": "city", "schema": schema, "strict": True}})
print("schema", json.loads(r.choices[0].message.content))
r = c.chat.completions.create(model=m, messages=msgs, temperature=0, max_tokens=100, extra_body={"guided_choice": ["London", "Paris", "Berlin"]})
print("choice", r.choices[0].message.content)
r = c.completions.create(model=m, prompt="The capital of France is", max_tokens=8, temperature=0.8, n=2, best_of=4, logprobs=2, seed=1)
print("best_of", [x.text for x in r.choices])
r = c.completions.create(model=m, prompt="1, 2, 3,", max_tokens=0, echo=True, logprobs=1)
print("echo", r.choices[0].logprobs.token_logprobs[:4])
for bad, kind in ((dict(model=m, messages=[]), BadRequestError), (dict(model="nope", messages=msgs), NotFoundError)):
    try:
        c.chat.completions.create(**bad); print("NOT REFUSED", bad)
    except kind as err:
        print("refused", err.status_code, err.body.get("param"))
if len(sys.argv) > 2:
    tools = [{"type": "function", "function": {"name": "get_weather", "description": "Weather of a city", "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}}}]
    q = [{"role": "user", "content": "What is the weather in Paris?"}]
    r = c.chat.completions.create(model=m, messages=q, tools=tools, tool_choice="required", parallel_tool_calls=False, temperature=0, max_tokens=80)
    print("tools", r.choices[0].finish_reason, r.choices[0].message.tool_calls)
    with c.chat.completions.stream(model=m, messages=q, tools=tools, tool_choice={"type": "function", "function": {"name": "get_weather"}}, temperature=0, max_tokens=80) as s:
        for _ in s: pass
        print("tools stream", s.get_final_completion().choices[0].message.tool_calls[0].function)
