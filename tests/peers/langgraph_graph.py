"""A LangGraph agent without a model: it sleeps as long as its input says, counts its turns, raises or asks on demand."""

import asyncio
import operator
from typing import Annotated, TypedDict

from langgraph.config import get_stream_writer
from langgraph.graph import END, START, StateGraph
from langgraph.types import interrupt


class State(TypedDict, total=False):
    say: str
    steps: int  # custom events of a turn
    sleep: float  # seconds before each of them
    fail: str  # the message of the exception to raise
    ask: str  # the question to interrupt with
    answer: str
    turns: Annotated[int, operator.add]
    heard: Annotated[list[str], operator.add]


async def work(state: State) -> State:
    write = get_stream_writer()
    for step in range(state.get("steps") or 1):
        await asyncio.sleep(state.get("sleep") or 0)
        write({"step": step})
    if state.get("fail"):
        raise ValueError(state["fail"])
    return {"turns": 1, "heard": [state.get("say", "")]}


async def ask(state: State) -> State:
    if not state.get("ask"):
        return {}
    return {"answer": interrupt(state["ask"]), "ask": ""}


builder = StateGraph(State)
builder.add_node("work", work)
builder.add_node("ask", ask)
builder.add_edge(START, "work")
builder.add_edge("work", "ask")
builder.add_edge("ask", END)
graph = builder.compile()
