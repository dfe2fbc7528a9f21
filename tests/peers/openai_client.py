"""Scenarios of the official OpenAI client: openai_client.py URL SCENARIO.. (transcript.py says what is printed)."""

import asyncio
import sys

from openai import APIError, APIStatusError, AsyncOpenAI

import transcript
from transcript import alone, until

MODEL = {"model": "scripted"}


class Context:
    def __init__(self, url: str) -> None:
        self.client = AsyncOpenAI(base_url=f"{url}/v1", api_key="none", websocket_base_url=f"{url.replace('http', 'ws')}/v1")
        self.responses, self.chat = self.client.responses, self.client.chat.completions

    async def create(self, text: str, **more):
        return await self.responses.create(**MODEL, input=text, **more)

    async def becomes(self, response: str, *wanted) -> str:
        async def reached():
            status = (await self.responses.retrieve(response)).status
            return status if status in wanted else None

        return await until(f"{response} becomes one of {wanted}", reached)


async def refused(call):
    """The status code with which a call is refused."""
    try:
        await call
        return "accepted"
    except APIStatusError as error:
        return error.status_code


def shown(event) -> list:
    if event.type == "response.output_text.delta":
        return [event.type, event.delta]
    if getattr(event, "response", None) is not None:
        return [event.type, event.response.status, event.response.output_text]
    return [event.type]


async def plain(context: Context):
    answer = await context.create("hi")
    failed = await context.create("fail")
    return [answer.status, answer.output_text, failed.status, failed.error.message]


async def stream(context: Context):
    events = [shown(event) async for event in await context.create("long 0.5", stream=True)]
    failed = [shown(event) async for event in await context.create("fail", stream=True)]
    return [events, failed]


async def chain(context: Context):
    """Each response follows another by its id; twenty chains at once, half of them streamed."""

    async def one(number: int):
        texts, before = [], None
        for turn in range(5):
            more = {"previous_response_id": before} if before else {}
            if number % 2:
                async for event in await context.create(f"{number}-{turn}", stream=True, **more):
                    if event.type == "response.completed":
                        answer = event.response
            else:
                answer = await context.create(f"{number}-{turn}", **more)
            before = answer.id
            texts.append(answer.output_text)
        return texts

    return await asyncio.gather(*(one(number) for number in range(20)))


async def conversation(context: Context):
    async def one(number: int):
        name = (await context.client.conversations.create()).id
        texts = [(await context.create(f"{number}-{turn}", conversation=name)).output_text for turn in range(4)]
        return texts, (await context.client.conversations.retrieve(name)).id == name

    return await asyncio.gather(*(one(number) for number in range(10)))


async def background(context: Context):
    """Created, left, polled, ended; read again by its id afterwards; followed by the next."""
    answer = await context.create("long 1", background=True)
    status = await context.becomes(answer.id, "completed", "failed")
    text = (await context.responses.retrieve(answer.id)).output_text
    after = await context.create("next", previous_response_id=answer.id)
    failed = await context.create("fail", background=True)
    return {
        "early": answer.status in ("queued", "in_progress"),
        "status": status,
        "text": text,
        "after": after.output_text,
        "failed": await context.becomes(failed.id, "completed", "failed"),
    }


async def cancel(context: Context):
    answer = await context.create("long 60", background=True)
    first = (await context.responses.cancel(answer.id)).status
    again = (await context.responses.cancel(answer.id)).status
    plain = await context.create("hi")
    return [first, again, await refused(context.responses.cancel(plain.id))]


async def resume(context: Context):
    """A background stream is left after some events and read on behind the last; then once more from its start."""
    seen, name, last = [], None, None
    events = await context.create("long 1.5", background=True, stream=True)
    async for event in events:
        if event.type == "response.created":
            name = event.response.id
        seen.append(shown(event)[:2])
        last = event.sequence_number
        if event.type == "response.output_text.delta" and event.delta == "2 ":
            break
    await events.close()
    await asyncio.sleep(0.2)
    async for event in await context.responses.retrieve(name, stream=True, starting_after=last):
        seen.append(shown(event)[:2])
    again = [shown(event)[:2] async for event in await context.responses.retrieve(name, stream=True)]
    return {"seen": seen, "whole": again == seen}


async def deleted(context: Context):
    answer = await context.create("hi")
    await context.responses.delete(answer.id)
    return await refused(context.responses.retrieve(answer.id))


async def unknown(context: Context):
    return [
        await refused(context.responses.retrieve("resp_nothing")),
        await refused(context.create("hi", previous_response_id="resp_nothing")),
        await refused(context.create("hi", conversation="conv_nothing")),
    ]


async def leave(context: Context):
    """A stream that is closed by its reader ends the response, which is not in the background."""
    events = await context.create("long 60", stream=True)
    async for event in events:
        if event.type == "response.created":
            name = event.response.id
        if event.type == "response.output_text.delta":
            break
    await events.close()
    return await context.becomes(name, "cancelled", "completed")


async def socket(context: Context):
    """One socket, one response after the other, each by the id of the last."""
    async with context.responses.connect() as connection:
        seen, before = [], None
        for turn in range(3):
            more = {"previous_response_id": before} if before else {}
            await connection.response.create(**MODEL, input=f"frame {turn}", **more)
            while True:
                event = await connection.recv()
                seen.append(shown(event))
                if event.type == "response.completed":
                    before = event.response.id
                    break
        await connection.response.create(**MODEL, input="lost", previous_response_id="resp_nothing")
        missing = await connection.recv()
        return [seen, missing.type]


async def lanes(context: Context):
    """Two lanes of a socket run at the same time, each in its order."""
    async with context.responses.connect() as connection:
        for lane, text in [("a", "long 0.5"), ("b", "one"), ("b", "two"), ("a", "last")]:
            await connection.send({"type": "response.create", **MODEL, "input": text, "stream_id": lane})
        done = []
        while len(done) < 4:
            event = await connection.recv()
            if event.type == "response.completed":
                done.append([event.stream_id, event.response.output_text])
        return done


@alone
async def socket_held(context: Context):
    """Three responses over a compressed socket, the last of which is at work when it is left, once told to."""
    async with context.responses.connect(websocket_connection_options={"compression": "deflate"}) as connection:
        seen = [connection._connection.response.headers["Sec-WebSocket-Extensions"].split(";")[0]]
        for text in ["one", "two", "long 60"]:
            await connection.response.create(**MODEL, input=text)
            last = "response.created" if text == "long 60" else "response.completed"
            while (event := await connection.recv()).type != last:
                pass
            seen.append(event.type)
        print("begun", flush=True)
        await asyncio.to_thread(sys.stdin.readline)
        return seen


async def chat(context: Context):
    messages = [{"role": "user", "content": "hi"}]
    answer = await context.chat.create(**MODEL, messages=messages)
    return [answer.choices[0].message.content, answer.choices[0].finish_reason]


async def chat_stream(context: Context):
    parts = []
    messages = [{"role": "user", "content": "long 0.5"}]
    async for chunk in await context.chat.create(**MODEL, messages=messages, stream=True):
        parts.append([chunk.choices[0].delta.content, chunk.choices[0].finish_reason])
    return parts


async def chat_fails(context: Context):
    """Fails in the middle of a stream, after status 200, and as a whole."""
    messages, parts, problem = [{"role": "user", "content": "fail"}], [], None
    try:
        async for chunk in await context.chat.create(**MODEL, messages=messages, stream=True):
            parts.append(chunk.choices[0].delta.content)
    except APIError as error:
        problem = error.message
    return [parts, problem, await refused(context.chat.create(**MODEL, messages=messages))]


async def chat_leave(context: Context):
    messages = [{"role": "user", "content": "long 60"}]
    chunks = await context.chat.create(**MODEL, messages=messages, stream=True)
    async for chunk in chunks:
        await chunks.close()
        return chunk.choices[0].delta.content


SCENARIOS = {
    scenario.__name__: scenario
    for scenario in [
        plain, stream, chain, conversation, background, cancel, resume, deleted, unknown, leave, socket, lanes, socket_held,
        chat, chat_stream, chat_fails, chat_leave,
    ]
}  # fmt: skip

if __name__ == "__main__":
    asyncio.run(transcript.run(SCENARIOS, Context))
