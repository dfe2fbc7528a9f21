"""Scenarios of the official LangGraph client: langgraph_client.py URL SCENARIO.. (transcript.py says what is printed)."""

import asyncio

import httpx
from langgraph_sdk import get_client
from langgraph_sdk.errors import APIStatusError

import transcript
from transcript import alone, until

LONG = {"steps": 600, "sleep": 0.1}  # a minute: only a cancel ends it in time


class Context:
    def __init__(self, url: str) -> None:
        self.url = url
        # No key: the client must not look for one in the environment.
        # Longer than its default of 5 s: where hundreds of calls are made at once, the last wait for a connection.
        self.client = get_client(url=url, api_key=None, timeout=60)
        self.threads, self.runs = self.client.threads, self.client.runs

    async def thread(self) -> str:
        return (await self.threads.create())["thread_id"]

    async def start(self, thread: str, input: dict, **more) -> str:
        return (await self.runs.create(thread, "agent", input=input, **more))["run_id"]

    async def status(self, thread: str, run: str):
        """The state of a run, or the status code of the answer where there is none."""
        try:
            return (await self.runs.get(thread, run))["status"]
        except (APIStatusError, httpx.HTTPStatusError) as error:
            return error.response.status_code

    async def becomes(self, thread: str, run: str, *wanted):
        async def reached():
            status = await self.status(thread, run)
            return status if status in wanted else None

        return await until(f"run {run} becomes one of {wanted}", reached)

    async def turns(self, thread: str) -> int:
        return (await self.threads.get_state(thread))["values"].get("turns", 0)


async def refused(call):
    """The status code with which a call is refused."""
    try:
        return await call
    except (APIStatusError, httpx.HTTPStatusError) as error:
        return error.response.status_code


def event(part) -> list:
    """An event without what the server makes up."""
    data = part.data
    if part.event == "metadata":
        data = sorted(data)
    return [part.event, data]


async def conversation(context: Context):
    """Turns of one thread find what earlier ones left, whatever the way they are run."""
    thread = await context.thread()
    waited = await context.runs.wait(thread, "agent", input={"say": "one"})
    streamed = [event(part) async for part in context.runs.stream(thread, "agent", input={"say": "two"})]
    run = await context.start(thread, {"say": "three"})
    joined = await context.runs.join(thread, run)
    history = await context.threads.get_history(thread)
    runs = await context.runs.list(thread)
    return {
        "waited": waited,
        "streamed": streamed,
        "joined": joined,
        "history": len(history),
        "runs": [run["status"] for run in runs],
        "thread": (await context.threads.get(thread))["status"],
    }


async def threads(context: Context):
    """Twenty threads at once keep their memories apart."""

    async def one(number: int):
        thread = await context.thread()
        for turn in range(3):
            await context.runs.wait(thread, "agent", input={"say": f"{number}-{turn}"})
        return (await context.threads.get_state(thread))["values"]["heard"]

    return await asyncio.gather(*(one(number) for number in range(20)))


async def stream_modes(context: Context):
    thread = await context.thread()
    stream = context.runs.stream(
        thread, "agent", input={"say": "hi", "steps": 3, "sleep": 0.05}, stream_mode=["custom", "updates", "values"]
    )
    return [event(part) async for part in stream]


async def stateless(context: Context):
    streamed = [event(part) async for part in context.runs.stream(None, "agent", input={"say": "hi"})]
    waited = await context.runs.wait(None, "agent", input={"say": "hi"})
    created = await context.runs.create(None, "agent", input={"say": "hi"})
    return {"streamed": streamed, "waited": waited, "created": "run_id" in created}


async def batch(context: Context):
    payloads = [{"assistant_id": "agent", "input": {"say": str(number)}} for number in range(3)]
    return len(await context.runs.create_batch(payloads))


async def errors(context: Context):
    """A graph that raises: an event in a 200, a member of a 200, a state of the run."""
    thread = await context.thread()
    streamed = [event(part) async for part in context.runs.stream(thread, "agent", input={"fail": "boom"})]
    waited = await context.runs.wait(await context.thread(), "agent", input={"fail": "boom"}, raise_error=False)
    thread = await context.thread()
    run = await context.start(thread, {"fail": "boom"})
    status = await context.becomes(thread, run, "success", "error")
    unknown = "00000000-0000-4000-8000-000000000000"
    return {
        "streamed": streamed,
        "waited": waited,
        "status": status,
        "unknown thread": await refused(context.start(unknown, {})),
        "unknown run": await context.status(thread, unknown),
        "bad assistant": await refused(context.runs.create(thread, "nobody", input={})),
    }


async def background(context: Context):
    """A run that no request waits for; polls see it end."""
    thread = await context.thread()
    run = await context.start(thread, {"say": "later", "sleep": 3})
    early = await context.becomes(thread, run, "pending", "running")
    final = await context.becomes(thread, run, "success", "error", "interrupted")
    return {"early": early in ("pending", "running"), "final": final, "turns": await context.turns(thread)}


async def wait_slow(context: Context):
    """Longer than the server's heartbeat of 5 s, which precedes the answer in a `wait`."""
    thread = await context.thread()
    return await context.runs.wait(thread, "agent", input={"say": "slow", "sleep": 6})


async def cancel(context: Context):
    thread = await context.thread()
    run = await context.start(thread, LONG)
    await context.becomes(thread, run, "running")
    await context.runs.cancel(thread, run, wait=True)
    status = await context.becomes(thread, run, "interrupted")
    again = await refused(context.runs.cancel(thread, run))
    after = await context.runs.wait(thread, "agent", input={"say": "after", "steps": 1, "sleep": 0})
    return {"status": status, "again": again, "after": after["turns"]}


async def cancel_rollback(context: Context):
    """Cancelled by rollback, a run is gone: 404 is its end, no failure of the server."""
    thread = await context.thread()
    run = await context.start(thread, LONG)
    await context.becomes(thread, run, "running")
    await context.runs.cancel(thread, run, action="rollback")
    return await context.becomes(thread, run, 404)


async def reject(context: Context):
    thread = await context.thread()
    first = await context.start(thread, LONG)
    second = await refused(context.start(thread, {}, multitask_strategy="reject"))
    await context.runs.cancel(thread, first, wait=True)
    return {"second": second, "first": await context.becomes(thread, first, "interrupted")}


async def enqueue(context: Context):
    thread = await context.thread()
    runs = [
        await context.start(thread, {"say": str(number), "sleep": 0.2}, multitask_strategy="enqueue")
        for number in range(3)
    ]
    for run in runs:
        await context.becomes(thread, run, "success")
    return (await context.threads.get_state(thread))["values"]["heard"]


async def interrupt(context: Context):
    """One create ends all earlier runs of its thread, the running and the waiting, and their streams."""
    thread = await context.thread()
    first = await context.start(thread, LONG)
    await context.becomes(thread, first, "running")
    second = await context.start(thread, LONG, multitask_strategy="enqueue")
    stream = asyncio.create_task(collect(context.runs.join_stream(thread, first)))
    third = await context.start(thread, {"say": "third", "steps": 1, "sleep": 0}, multitask_strategy="interrupt")
    return {
        "first": await context.becomes(thread, first, "interrupted", "success"),
        "second": await context.becomes(thread, second, "interrupted", "success"),
        "third": await context.becomes(thread, third, "success"),
        "stream ended": isinstance(await stream, list),
    }


async def rollback(context: Context):
    thread = await context.thread()
    first = await context.start(thread, LONG)
    await context.becomes(thread, first, "running")
    second = await context.start(thread, {"say": "second", "steps": 1, "sleep": 0}, multitask_strategy="rollback")
    return {
        "first": await context.becomes(thread, first, 404),
        "second": await context.becomes(thread, second, "success"),
        "turns": await context.turns(thread),
    }


async def collect(stream) -> list:
    return [event(part) async for part in stream]


async def delete_thread(context: Context):
    thread = await context.thread()
    run = await context.start(thread, LONG)
    await context.becomes(thread, run, "running")
    await context.threads.delete(thread)

    async def gone():
        return await refused(context.threads.get(thread)) == 404

    await until("the thread is gone", gone)
    return await context.becomes(thread, run, 404)


async def delete_run(context: Context):
    thread = await context.thread()
    run = await context.start(thread, {"say": "done"})
    await context.becomes(thread, run, "success")
    await context.runs.delete(thread, run)
    return await context.becomes(thread, run, 404)


async def human(context: Context):
    """A graph that asks: the thread waits, a command answers."""
    thread = await context.thread()
    asked = await context.runs.wait(thread, "agent", input={"ask": "sure?"})
    status = (await context.threads.get(thread))["status"]
    answered = await context.runs.wait(thread, "agent", command={"resume": "yes"})
    question = [question["value"] for question in asked["__interrupt__"]]
    return {"question": question, "thread": status, "answer": answered["answer"]}


async def resume(context: Context):
    """A stream that is cut goes on behind the last event that was seen; later it can be read whole."""
    thread = await context.thread()
    run = await context.start(
        thread, {"steps": 10, "sleep": 0.1}, stream_mode=["custom"], stream_resumable=True
    )
    seen, ids = [], []
    async for part in context.runs.join_stream(thread, run, stream_mode="custom", last_event_id="-1"):
        if part.event == "custom":
            seen.append(part.data["step"])
            ids.append(part.id)
        if len(seen) == 3:
            break
    await asyncio.sleep(0.3)
    async for part in context.runs.join_stream(thread, run, stream_mode="custom", last_event_id=ids[-1]):
        # Where the past meets the present a busy server may send an event twice. Its id does not tell: it is a time in
        # milliseconds, and a server that was held up gives two events the same.
        if part.event == "custom" and part.data["step"] not in seen:
            seen.append(part.data["step"])
    again = []
    async for part in context.runs.join_stream(thread, run, stream_mode="custom", last_event_id="-1"):
        if part.event == "custom":
            again.append(part.data["step"])
    return {"seen": seen, "again": again, "status": await context.becomes(thread, run, "success")}


async def leave(context: Context):
    """A stream that its reader leaves: by default the run goes on, with `on_disconnect` it is cancelled."""

    async def one(input: dict, mode: str, *final):
        thread, found = await context.thread(), {}
        stream = context.runs.stream(
            thread, "agent", input=input, stream_mode="custom", on_disconnect=mode, on_run_created=found.update
        )
        async for part in stream:
            if part.event == "custom":
                break
        await stream.aclose()
        return await context.becomes(thread, found["run_id"], *final)

    gone_on, cancelled = await asyncio.gather(
        one({"steps": 15, "sleep": 0.1}, "continue", "success", "interrupted"),
        one(LONG, "cancel", "success", "interrupted"),
    )
    return {"continue": gone_on, "cancel": cancelled}


async def delayed(context: Context):
    thread = await context.thread()
    run = await context.start(thread, {"say": "later"}, after_seconds=1)
    return await context.becomes(thread, run, "success")


@alone
async def cancel_all(context: Context):
    """Ends every run of a server without naming one."""
    thread = await context.thread()
    run = await context.start(thread, LONG)
    await context.becomes(thread, run, "running")
    await context.runs.cancel_many(thread_id=thread, run_ids=[run])
    return await context.becomes(thread, run, "interrupted")


@alone
async def leave_background(context: Context, count: str, seconds: str):
    """Creates runs, each on its own thread, and leaves them."""

    async def one():
        thread = await context.thread()
        await context.start(thread, {"sleep": float(seconds)})

    await asyncio.gather(*(one() for _ in range(int(count))))
    return int(count)


@alone
async def create_threads(context: Context, count: str):
    made = await asyncio.gather(*(context.thread() for _ in range(int(count))))
    return len(set(made))


SCENARIOS = {
    scenario.__name__: scenario
    for scenario in [
        conversation, threads, stream_modes, stateless, batch, errors, background, wait_slow, cancel, cancel_rollback,
        reject, enqueue, interrupt, rollback, delete_thread, delete_run, human, resume, leave, delayed, cancel_all,
        leave_background, create_threads,
    ]
}  # fmt: skip

if __name__ == "__main__":
    asyncio.run(transcript.run(SCENARIOS, Context))
