"""A TCP relay between a client and a server, which a test makes stall, corrupt, slow down or reset the connections."""

from __future__ import annotations

import contextlib
import random
import socket
import struct
import threading
import time


class Relay:
    """Relays 127.0.0.1:`port` to 127.0.0.1:`to`; `mode` is `pass`, `stall`, `corrupt` (from the server) or `slow`."""

    def __init__(self, to: int) -> None:
        self.mode = "pass"
        self._to = to
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        self._ends: list[socket.socket] = []
        threading.Thread(target=self._accept, name="relay", daemon=True).start()

    def reset(self) -> None:
        """Break all connections with RST."""
        ends, self._ends = self._ends, []
        for end in ends:
            with contextlib.suppress(OSError):
                end.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                end.shutdown(socket.SHUT_RDWR)
            end.close()

    def close(self) -> None:
        """Listen no more, and break all connections."""
        self.mode = "pass"
        self._listener.close()
        self.reset()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            try:
                server = socket.create_connection(("127.0.0.1", self._to))
            except OSError:
                client.close()
                continue
            self._ends += [client, server]
            for source, sink, downwards in ((client, server, False), (server, client, True)):
                threading.Thread(target=self._pump, args=(source, sink, downwards), name="relay", daemon=True).start()

    def _pump(self, source: socket.socket, sink: socket.socket, downwards: bool) -> None:
        noise = random.Random(0)
        with contextlib.suppress(OSError):
            while block := source.recv(65536):
                while self.mode == "stall":
                    time.sleep(0.01)
                if self.mode == "slow":
                    time.sleep(0.1)
                if self.mode == "corrupt" and downwards and len(block) > 400:
                    damaged = bytearray(block)
                    for _ in range(8):
                        damaged[noise.randrange(60, len(block))] ^= 0xFF
                    block = bytes(damaged)
                sink.sendall(block)
        for end in (source, sink):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
