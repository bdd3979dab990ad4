"""A client that leaves while the server reads its request."""

import asyncio

from starlette.types import Message, Receive, Scope, Send

from tests.server.middlewares import CHAT, scope_of, steering_app


def test_disconnect_reaches_the_server_after_the_body() -> None:
    got: list[Message] = []
    coming: list[Message] = [
        {"type": "http.request", "body": b'{"messages"', "more_body": True},
        {"type": "http.request", "body": b": []}", "more_body": False},
        {"type": "http.disconnect"},
    ]

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        got.extend([await receive(), await receive()])

    async def receive() -> Message:
        return coming.pop(0)

    async def nowhere(message: Message) -> None:
        raise AssertionError(message)

    middleware = steering_app(app)
    asyncio.run(middleware(scope_of(CHAT), receive, nowhere))
    assert got == [
        {"type": "http.request", "body": b'{"messages":[]}', "more_body": False},
        {"type": "http.disconnect"},
    ]
