"""What the Python clients of the tests share: scenarios by name, and a transcript of what a user of the client sees.

A client is started as `client.py URL SCENARIO..`; `all` means every scenario that needs no argument. It runs them at the
same time and prints one line of JSON for each: `{"scenario": .., "seen": ..}`. What a server chooses by chance (ids,
times) is left out of what is seen, so that the transcript of one server and that of a proxy before three must be equal.
"""

import asyncio
import json
import sys
import traceback


async def run(scenarios: dict, make_context) -> None:
    url, names = sys.argv[1], sys.argv[2:]
    if "all" in names:
        names.remove("all")
        names += [name for name, scenario in scenarios.items() if not getattr(scenario, "alone", False)]
    failed = False

    async def one(name: str) -> None:
        nonlocal failed
        name, _, argument = name.partition("=")
        try:
            arguments = argument.split(",") if argument else []
            seen = await scenarios[name](make_context(url), *arguments)
        except Exception:
            failed = True
            seen = {"exception": traceback.format_exc(limit=-4)}
        print(json.dumps({"scenario": name, "seen": seen}), flush=True)

    await asyncio.gather(*(one(name) for name in names))
    sys.exit(1 if failed else 0)


def alone(scenario):
    """Marks a scenario that `all` leaves out: it measures, or takes arguments."""
    scenario.alone = True
    return scenario


async def until(what: str, condition, seconds: float = 20.0):
    """The first true value of `condition`; fails when the time has passed."""
    end = asyncio.get_running_loop().time() + seconds
    while True:
        value = await condition()
        if value:
            return value
        if asyncio.get_running_loop().time() > end:
            raise TimeoutError(f"did not happen within {seconds} s: {what}")
        await asyncio.sleep(0.05)
