"""The serving API on a real port, its event loop in a thread; for tests that attack it from outside."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from typing import Any

import uvicorn

from tests.served import Server

Do = Callable[[Coroutine[Any, Any, Any]], Any]


@contextmanager
def loop_thread() -> Iterator[Do]:
    """Yields a function that runs a coroutine in the thread's loop, and waits for it."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    try:
        yield lambda task: asyncio.run_coroutine_threadsafe(task, loop).result(600)
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join(120)
        loop.close()


@contextmanager
def on_a_port(server: Server, do: Do) -> Iterator[int]:
    """The routes of `server` under uvicorn, as Ray Serve's proxy runs them."""
    app = server.http._transport.app
    web = uvicorn.Server(uvicorn.Config(app, host="127.0.0.1", port=0, log_level="warning", lifespan="off", timeout_keep_alive=5))

    async def begin() -> asyncio.Task[None]:
        task = asyncio.create_task(web.serve())
        while not web.started:
            await asyncio.sleep(0.01)
        return task

    async def end(task: asyncio.Task[None]) -> None:
        web.should_exit = True
        await task

    web.install_signal_handlers = lambda: None
    task = do(begin())
    try:
        yield web.servers[0].sockets[0].getsockname()[1]
    finally:
        do(end(task))
