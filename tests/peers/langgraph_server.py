"""`langgraph dev` with the graph beside this file, on a port of its own: langgraph_server.py [JOBS].

It writes into the working directory, so it is started in one of its own.
"""

import json
import os
import pathlib
import sys

import serving

os.environ.update(
    LANGSMITH_TRACING="false",
    LANGGRAPH_CLI_NO_ANALYTICS="1",
    # Memory only: nothing of one test is found by the next.
    LANGGRAPH_DISABLE_FILE_PERSISTENCE="true",
)
jobs = sys.argv[1] if len(sys.argv) > 1 else "10"
folder = pathlib.Path(__file__).resolve().parent
graphs = {"agent": f"{folder / 'langgraph_graph.py'}:graph"}
pathlib.Path("langgraph.json").write_text(json.dumps({"dependencies": ["."], "graphs": graphs}))

# Held open while the server listens beside it.
reserved, port = serving.reserve_port()
serving.end_with_standard_input()
serving.announce(port)

from langgraph_cli.cli import cli  # noqa: E402: the port is told before the slow import

arguments = ["dev", "--host", "127.0.0.1", "--port", str(port), "--n-jobs-per-worker", jobs]
cli(arguments + ["--no-browser", "--no-reload", "--config", "langgraph.json"])
