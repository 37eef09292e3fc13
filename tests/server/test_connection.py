"""What is written in one turn of the event loop is sent together, all of it and in order."""

from __future__ import annotations

import asyncio

from latentkv.server.connection import JoiningTransport


class Noted(asyncio.Transport):
    """Notes what it is told."""

    def __init__(self) -> None:
        super().__init__({"peername": ("a client", 1)})
        self.noted: list[bytes | str] = []

    def write(self, data: bytes | bytearray | memoryview) -> None:
        self.noted.append(bytes(data))

    def close(self) -> None:
        self.noted.append("close")

    def abort(self) -> None:
        self.noted.append("abort")


def test_writes_of_one_turn_are_one_and_those_of_the_next_another() -> None:
    async def main() -> None:
        transport = Noted()
        joining = JoiningTransport(transport, asyncio.get_running_loop())
        joining.write(b"head ")
        joining.write(b"body")
        assert transport.noted == []
        await asyncio.sleep(0)
        assert transport.noted == [b"head body"]
        joining.write(b"end")
        await asyncio.sleep(0)
        assert transport.noted == [b"head body", b"end"]
        assert joining.get_extra_info("peername") == ("a client", 1)

    asyncio.run(main())


def test_what_was_written_is_sent_before_the_connection_closes_and_not_where_it_is_aborted() -> None:
    async def main() -> None:
        for end in ("close", "abort"):
            transport = Noted()
            joining = JoiningTransport(transport, asyncio.get_running_loop())
            joining.write(b"last words")
            getattr(joining, end)()
            await asyncio.sleep(0)
            assert transport.noted == ([b"last words", "close"] if end == "close" else ["abort"])

    asyncio.run(main())
