"""urllib with a time limit for a whole exchange, and without redirects.

http.client's own limit begins anew with every byte that comes, in the headers too: a server that
sends one now and then would hold a caller for ever.
"""

from __future__ import annotations

import functools
import http.client
import io
import socket
import ssl
import time
import urllib.request
from typing import Any


class _Received(io.RawIOBase):
    """What a socket receives, up to a moment of time.monotonic; then TimeoutError."""

    def __init__(self, raw: io.RawIOBase, sock: socket.socket, deadline: float):
        self._raw, self._socket, self._deadline = raw, sock, deadline

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int | None:
        left = self._deadline - time.monotonic()
        if left <= 0:
            raise TimeoutError("the reply was not complete in time")
        self._socket.settimeout(left)
        return self._raw.readinto(buffer)

    def close(self) -> None:
        self._raw.close()
        super().close()


class _Response(http.client.HTTPResponse):
    def __init__(self, sock: socket.socket, *args: Any, deadline: float, **options: Any):
        super().__init__(sock, *args, **options)
        self.fp = io.BufferedReader(_Received(self.fp.detach(), sock, deadline))


class _Bounded(http.client.HTTPConnection):
    """A connection for one exchange, all of which ends `timeout` seconds after this is made."""

    def __init__(self, host: str, /, **options: Any):
        super().__init__(host, **options)
        self._deadline = time.monotonic() + options["timeout"]
        response = functools.partial(_Response, deadline=self._deadline)
        self.response_class = response  # type: ignore[assignment]  # http.client only calls it

    def connect(self) -> None:
        super().connect()
        self.sock.settimeout(max(self._deadline - time.monotonic(), 1e-3))  # 0 would not block


class _BoundedTLS(_Bounded, http.client.HTTPSConnection):
    pass


class _HTTP(urllib.request.HTTPHandler):
    def http_open(self, request: urllib.request.Request) -> http.client.HTTPResponse:
        return self.do_open(_Bounded, request)


class _HTTPS(urllib.request.HTTPSHandler):
    def __init__(self) -> None:
        self._verifying = ssl.create_default_context()  # made once: it reads all authorities
        super().__init__(context=self._verifying)

    def https_open(self, request: urllib.request.Request) -> http.client.HTTPResponse:
        return self.do_open(_BoundedTLS, request, context=self._verifying)


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """A redirect is an HTTPError: following one would take a key elsewhere."""

    def redirect_request(self, *unused: Any) -> None:
        return None


def opener() -> urllib.request.OpenerDirector:
    """What opens a URL, given `timeout`: seconds, for connecting, sending and receiving together.

    Raises TimeoutError, or URLError of one, when they are over.
    """
    return urllib.request.build_opener(_HTTP, _HTTPS, _NoRedirect)
