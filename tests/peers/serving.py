"""What the Python servers of the tests share: a port that nobody else takes, the line that tells it, and an end.

A server prints `port N` as its first line, listens on 127.0.0.1, and ends when its standard input does: the test that
started it holds the other end, so no server outlives its test, however that ends.
"""

import os
import socket
import sys
import threading


def reserve_port() -> tuple[socket.socket, int]:
    """A bound socket that doesn't listen, and its port. While it is open the system gives the port to nobody else;
    a server that sets SO_REUSEADDR (all do) may still listen there."""
    reserved = socket.socket()
    reserved.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    reserved.bind(("127.0.0.1", 0))
    return reserved, reserved.getsockname()[1]


def announce(port: int) -> None:
    print(f"port {port}", flush=True)


def end_with_standard_input() -> None:
    def watch() -> None:
        while sys.stdin.buffer.read(4096):
            pass
        os._exit(0)

    threading.Thread(target=watch, daemon=True).start()


def serve(app, listening: socket.socket) -> None:
    """Serves an ASGI application on a bound socket until the end of standard input."""
    import uvicorn

    end_with_standard_input()
    announce(listening.getsockname()[1])
    config = uvicorn.Config(app, log_level="warning", lifespan="auto", timeout_keep_alive=75)
    uvicorn.Server(config).run(sockets=[listening])
