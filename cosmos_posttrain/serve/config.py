"""What the service can be told; flags and checks. No torch.

Flows in: defaults < YAML < flags < overrides (``cli.py``). Flows out: a ``ServeConfig``.
"""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass

from cosmos_posttrain.cli import Flag, flag_names
from cosmos_posttrain.config import check, setting
from cosmos_posttrain.inference.config import SESSION_FLAGS, SessionConfig

_MIN_TOKEN_LENGTH = 8


@dataclass
class ServeConfig(SessionConfig):
    """A session, who may ask it for clips, and how much they may send.

    Attributes:
        host: address to listen on; other machines are served at 0.0.0.0 or an own address, and only
            with --auth_token.
        port: to listen on; 0 takes a free one and says which.
        auth_token: what clients must show (Authorization: Bearer TOKEN); the page asks for it.
        max_queue: clips that may wait; who comes when it is full is told to come later.
        max_batch_size: waiting clips with the same settings that are generated together.
        max_history: finished clips that are kept, until the service ends.
        max_upload_mb: megabytes of an upload.
        max_upload_side: pixels of an upload's longer side.
        max_upload_seconds: of an uploaded clip; only its first frames are used.
        guardrail_dir: weights of the guardrail (nvidia/Cosmos-1.0-Guardrail): prompts are checked,
            faces are blurred.
        disable_guardrail: check nothing, and say nothing about it.
    """

    host: str = "127.0.0.1"
    port: int = setting(8000, at_least=0, at_most=65535)
    auth_token: str | None = None
    max_queue: int = setting(64, at_least=1)
    max_batch_size: int = setting(4, at_least=1)
    max_history: int = setting(200, at_least=1)
    max_upload_mb: int = setting(64, at_least=1)
    max_upload_side: int = setting(8192, at_least=16, at_most=16384)
    max_upload_seconds: float = setting(600.0, above=0)
    guardrail_dir: str | None = None
    disable_guardrail: bool = False


FLAGS = (
    *SESSION_FLAGS,
    Flag("--host"),
    Flag("--port"),
    Flag("--auth_token"),
    Flag("--max_queue"),
    Flag("--max_batch_size"),
    Flag("--max_history"),
    Flag("--max_upload_mb"),
    Flag("--max_upload_side"),
    Flag("--max_upload_seconds"),
    Flag("--guardrail_dir"),
    Flag("--disable_guardrail"),
)


def is_loopback(host: str) -> bool:
    """Whether an address reaches this machine alone."""
    if host.lower().rstrip(".") == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


def validate(config: ServeConfig) -> None:
    """Lists every problem that no checkpoint could make right, at once; changes nothing.

    Raises:
        ConfigError: one sentence with all of them.
    """
    problems = []
    token = config.auth_token
    if token is None and not is_loopback(config.host):
        problems.append(
            f"--host {config.host} can be reached from other machines and needs --auth_token; give "
            "one, or keep 127.0.0.1"
        )
    if token is not None and (
        len(token) < _MIN_TOKEN_LENGTH or not token.isascii() or not token.isprintable()
    ):
        problems.append(f"--auth_token must have at least {_MIN_TOKEN_LENGTH} ASCII characters")
    if token is not None and " " in token:
        problems.append("--auth_token must not hold spaces")
    if config.guardrail_dir is not None and config.disable_guardrail:
        problems.append("--guardrail_dir does not go with --disable_guardrail; leave one out")
    check(config, flag_names(FLAGS), problems)
