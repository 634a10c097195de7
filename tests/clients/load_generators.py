"""Sends what load generators send, and reads the answers as they do: vLLM's `bench serve`, guidellm and aiperf.

    python load_generators.py http://127.0.0.1:8000 [API key]

Their requests are written down here, as they themselves bring gigabytes of packages. Several go out at once.
"""

import asyncio
import json
import time

import aiohttp
from checks import KEY, URL, call, check

MODEL = call("/v1/models")["data"][0]["id"]
TEXT, OUTPUT, CLIENTS = "What is the capital of France?", 12, 6


async def events(session: aiohttp.ClientSession, path: str, body: dict, headers: dict) -> list[tuple[float, dict]]:
    """The objects of a stream with the seconds until each came; checks what all readers of streams rely on."""
    start, found, done = time.perf_counter(), [], False
    async with session.post(URL + path, json=body, headers=headers) as answer:
        assert answer.status == 200, await answer.text()
        assert answer.headers["content-type"].split(";")[0] == "text/event-stream", answer.headers
        async for line in answer.content:
            text = line.decode().strip()
            if not text or text.startswith(":"):
                continue
            assert text.startswith("data: ") and not done, text
            if text == "data: [DONE]":
                done = True
            else:
                found.append((time.perf_counter() - start, json.loads(text[6:])))
    assert done, "a stream without an end"
    return found


async def vllm_completions(session: aiohttp.ClientSession, number: int) -> None:
    body = {"model": MODEL, "prompt": TEXT, "repetition_penalty": 1.0, "max_tokens": OUTPUT, "logprobs": None,
            "stream": True, "stream_options": {"include_usage": True}, "temperature": 0.0, "ignore_eos": True}
    headers = {"authorization": f"Bearer {KEY}", "x-request-id": f"bench-{number}"}
    found = await events(session, "/v1/completions", body, headers)
    texts = [(at, data["choices"][0]["text"]) for at, data in found if data.get("choices")]
    assert texts and texts[0][0] > 0, "no first token to time"
    usage = [data["usage"] for _, data in found if data.get("usage")]
    assert usage[-1]["completion_tokens"] == OUTPUT, usage


async def vllm_chat(session: aiohttp.ClientSession, number: int) -> None:
    body = {"model": MODEL, "messages": [{"role": "user", "content": [{"type": "text", "text": TEXT}]}],
            "max_completion_tokens": OUTPUT, "stream": True, "stream_options": {"include_usage": True},
            "temperature": 0.0, "ignore_eos": True}
    headers = {"authorization": f"Bearer {KEY}", "x-request-id": f"chat-{number}"}
    found = await events(session, "/v1/chat/completions", body, headers)
    first = next(data for _, data in found if data["choices"])
    # The first chunk with choices is the first token in their eyes.
    assert first["choices"][0]["delta"].get("content"), first
    assert found[-1][1]["choices"] == [] and found[-1][1]["usage"]["completion_tokens"] == OUTPUT, found[-1]


async def guidellm(session: aiohttp.ClientSession, number: int) -> None:
    async with session.get(f"{URL}/health") as health:
        assert health.status // 100 == 2
    options = {"include_usage": True, "continuous_usage_stats": True}
    body = {"model": MODEL, "prompt": f"{number} {TEXT}", "max_tokens": OUTPUT, "max_completion_tokens": OUTPUT,
            "stream": True, "stream_options": options, "stop": None, "ignore_eos": True}
    found = await events(session, "/v1/completions", body, {"authorization": f"Bearer {KEY}"})
    counts = [data["usage"]["completion_tokens"] for _, data in found if data.get("usage")]
    assert counts == sorted(counts) and counts[-1] == OUTPUT, counts
    details = found[-1][1]["usage"]["prompt_tokens_details"]
    assert details is None or details["cached_tokens"] >= 0, details


async def aiperf(session: aiohttp.ClientSession, _: int) -> None:
    headers = {"authorization": f"Bearer {KEY}", "accept": "text/event-stream"}
    body = {"model": MODEL, "prompt": [TEXT], "max_tokens": OUTPUT, "stream": True}
    # It reads the first choice of every chunk, so there may be none without.
    assert all(data["choices"] for _, data in await events(session, "/v1/completions", body, headers))
    chat = {"model": MODEL, "messages": [{"role": "user", "name": None, "content": TEXT}], "stream": True,
            "max_completion_tokens": OUTPUT}
    assert all(data["choices"] for _, data in await events(session, "/v1/chat/completions", chat, headers))


async def main() -> None:
    async with aiohttp.ClientSession() as session:
        for kind in (vllm_completions, vllm_chat, guidellm, aiperf):
            await asyncio.gather(*(kind(session, number) for number in range(CLIENTS)))
            check(f"{kind.__name__}, {CLIENTS} at once", True)
        async with session.get(f"{URL}/metrics") as answer:
            text = await answer.text()
        names = ("vllm:num_requests_waiting", "vllm:num_requests_running", "vllm:kv_cache_usage_perc")
        check("what routers read", all(name in text for name in names))


asyncio.run(main())
print("all checks hold")
