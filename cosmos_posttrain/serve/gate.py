"""Who may ask: everything passes here before it reaches an address.

Flows in: requests. Flows out: those with the token, where there is one; from this machine's own
names, where there is none (a foreign page may not reach a service on this machine under a name of
its own, nor send it forms). Every answer tells the browser to load nothing from elsewhere.
"""

from __future__ import annotations

import hmac

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from cosmos_posttrain.serve import uploads
from cosmos_posttrain.serve.config import ServeConfig, is_loopback

# The page itself holds nothing, and what watches the service has no token.
_OPEN = {"/", "/serve.css", "/serve.js", "/healthz"}
_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data: blob:; "
    "media-src blob:; connect-src 'self'; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'"
)
_HEADERS = {
    "content-security-policy": _POLICY,
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-resource-policy": "same-origin",
}


class Gate:
    """An ASGI application around another one.

    Args:
        app: what is guarded.
        config: of the service.
    """

    def __init__(self, app: ASGIApp, config: ServeConfig) -> None:
        self._app = app
        self._host, self._token = config.host, config.auth_token

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Lets a request pass, or answers it."""
        if scope["type"] != "http":
            return

        async def send_safely(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in _HEADERS.items():
                    headers.setdefault(name, value)
            await send(message)

        refusal = self._refusal(Headers(scope=scope), scope["path"])
        if refusal is None:
            await self._app(scope, receive, send_safely)
            return
        status, problem = refusal
        await uploads.Body(receive).drain()
        headers = {"www-authenticate": "Bearer"} if status == 401 else None
        answer = JSONResponse({"problem": problem}, status, headers)
        await answer(scope, receive, send_safely)

    def _refusal(self, headers: Headers, path: str) -> tuple[int, str] | None:
        host = headers.get("host", "")
        origin = headers.get("origin")
        if self._token is None and not is_loopback(_bare(host)) and _bare(host) != self._host:
            return 403, f"this service is not {host!r}; ask for it as {self._host}."
        if origin is not None and origin.partition("://")[2] != host:
            return 403, "pages of other sites may not use this service."
        if self._token is None or path in _OPEN:
            return None
        given = headers.get("authorization", "").removeprefix("Bearer ").encode()
        if hmac.compare_digest(given, self._token.encode()):
            return None
        return 401, "the token is missing or wrong; send Authorization: Bearer TOKEN."


def _bare(host: str) -> str:
    """``localhost:8000`` -> ``localhost``, ``[::1]:8000`` -> ``::1``."""
    if host.startswith("["):
        return host[1:].partition("]")[0]
    return host.rpartition(":")[0] if ":" in host else host
