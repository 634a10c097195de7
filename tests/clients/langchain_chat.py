"""Talks to a running server through LangChain.

    python langchain_chat.py http://127.0.0.1:8000 [API key]
"""

import asyncio

from checks import KEY, QUESTION, URL, call, check
from langchain_core.messages import HumanMessage, SystemMessage
from langchain_openai import ChatOpenAI, OpenAI, OpenAIEmbeddings

MODEL = call("/v1/models")["data"][0]["id"]
SERVER = dict(base_url=f"{URL}/v1", api_key=KEY, model=MODEL, max_retries=0)
TEXT = QUESTION[0]["content"]

chat = ChatOpenAI(**SERVER, temperature=0, max_tokens=40)


def answers() -> str:
    whole = chat.invoke(TEXT)
    check("invoke", whole.content and whole.usage_metadata["output_tokens"] > 0, repr(whole.content))
    chunks = list(chat.stream(TEXT, stream_usage=True))
    check("stream", "".join(chunk.content for chunk in chunks) == whole.content)
    used = next(chunk.usage_metadata for chunk in chunks if chunk.usage_metadata)
    check("usage of a stream", used["total_tokens"] == whole.usage_metadata["total_tokens"], used)
    batch = chat.batch([TEXT, "Hello!", TEXT])
    check("batch", batch[0].content == batch[2].content == whole.content)
    told = chat.invoke([SystemMessage("You are a helpful assistant."), HumanMessage([{"type": "text", "text": TEXT}])])
    check("system message and typed parts", told.content == whole.content)
    stopped = chat.invoke(TEXT, stop=[whole.content[4:8]])
    check("stop", stopped.content == whole.content[:4], repr(stopped.content))
    return whole.content


async def together(expected: str) -> None:
    found = await asyncio.gather(*(chat.ainvoke(TEXT) for _ in range(8)))
    check("eight at once", all(message.content == expected for message in found))


def logprobs() -> None:
    out = ChatOpenAI(**SERVER, temperature=0, max_tokens=4, logprobs=True, top_logprobs=2).invoke(TEXT)
    content = out.response_metadata["logprobs"]["content"]
    check("logprobs", len(content) == 4 and all(len(t["top_logprobs"]) == 2 for t in content))


def formats() -> None:
    city = {"title": "City", "description": "A city", "type": "object", "properties": {"city": {"enum": ["Rome", "Paris"]}},
            "required": ["city"], "additionalProperties": False}
    roomy = ChatOpenAI(**SERVER, temperature=0, max_tokens=120)
    for method in ("json_schema", "function_calling"):
        found = roomy.with_structured_output(city, method=method).invoke(TEXT)
        check(f"structured output by {method}", found["city"] in ("Rome", "Paris"), found)


def tools() -> None:
    def weather(city: str) -> str:
        """Weather of a city."""
        return city
    bound = ChatOpenAI(**SERVER, temperature=0, max_tokens=300).bind_tools([weather], tool_choice="weather")
    out = bound.invoke(TEXT)
    names = [call["name"] for call in out.tool_calls + out.invalid_tool_calls]
    check("tools", names == ["weather"], out.tool_calls or "cut off")


def completions_and_embeddings() -> None:
    text = OpenAI(**SERVER, temperature=0, max_tokens=8)
    check("completions", text.invoke("What is the") == "".join(text.stream("What is the")))
    # Without the length check LangChain sends texts; with it, token ids of a tokenizer that is not the model's.
    embeddings = OpenAIEmbeddings(**SERVER, check_embedding_ctx_length=False)
    vectors = embeddings.embed_documents(["one", "two"])
    check("embeddings", len(vectors) == 2 and embeddings.embed_query("one") == vectors[0], len(vectors[0]))


asyncio.run(together(answers()))
logprobs()
formats()
tools()
completions_and_embeddings()
print("all checks hold")
