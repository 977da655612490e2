"""The service from its start to its end.

Flows in: a ``ServeConfig``. Flows out: nothing that stays; clips live in a temporary folder. On
SIGTERM or Ctrl-C who waits is told that the service ends, and what is generated is given up at its
next latent frame; the exit code is 0.
"""

from __future__ import annotations

import asyncio
import contextlib
import signal
import socket
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import uvicorn

from cosmos_posttrain import launch
from cosmos_posttrain.checkpoint.dist import quiet_megatron_logging
from cosmos_posttrain.errors import ConfigError, CosmosPosttrainError
from cosmos_posttrain.inference.guardrail import Guardrail
from cosmos_posttrain.inference.session import Session
from cosmos_posttrain.serve import following
from cosmos_posttrain.serve.app import Desk, make_app
from cosmos_posttrain.serve.command import ClipCommand
from cosmos_posttrain.serve.config import ServeConfig, validate
from cosmos_posttrain.serve.metrics import Metrics
from cosmos_posttrain.serve.queue import JobQueue
from cosmos_posttrain.serve.worker import Worker
from cosmos_posttrain.video import check_writing

# After a signal, until connections and then the worker are left to themselves.
_LAST_SECONDS = 20


class _Server(uvicorn.Server):
    """Leaves signals to ``serve``, and says when it can be reached."""

    ready = ""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        launch.say(self.ready)


def bind(host: str, port: int) -> socket.socket:
    """A socket at the address, which nobody can connect to yet.

    Raises:
        ConfigError: the address is not this machine's, or is taken.
    """
    bound = None
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host.strip("[]"), port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        bound = socket.socket(family, kind, protocol)
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind(address)
    except OSError as error:
        if bound is not None:
            bound.close()
        raise ConfigError(
            f"--host {host} --port {port} cannot be listened on ({error.strerror}); choose another "
            "--port, or 0 for a free one."
        ) from error
    return bound


def run(config: ServeConfig) -> None:
    """Serves until a signal comes; other ranks follow the first.

    Raises:
        UserError: bad usage, or a model that cannot be opened.
        CosmosPosttrainError: generation ended by itself.
    """
    quiet_megatron_logging()
    validate(config)
    guardrail = Guardrail(config.guardrail_dir, config.disable_guardrail)
    # Before a large model is loaded; where it cannot be had, the other ranks end with this one.
    bound = bind(config.host, config.port) if launch.is_rank_zero() else None
    session = open_session(config)
    if bound is None:
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, signal.SIG_IGN)  # the first rank says when it ends
        following.follow(session)
        return
    notes = (*session.notes, *guardrail.notes)
    for note in notes:
        launch.say(f"note: {note}.", error=True)
    with tempfile.TemporaryDirectory(prefix="cosmos-serve-") as folder:
        asyncio.run(serve(config, session, guardrail, notes, bound, Path(folder)))


def open_session(config: ServeConfig) -> Session:
    """The session with its model loaded; all ranks together.

    Raises:
        UserError: it cannot be opened, or no mp4 can be written, or none of its clips' size.
    """
    session = Session(config)
    size, clip = session.tensor_model_parallel_size, session.geometry
    if size != launch.world_size():
        raise ConfigError(
            f"a service has one model: --tensor_model_parallel_size {size} must be the number of "
            f"processes, {launch.world_size()}; start another service for more."
        )
    if clip.height % 2 or clip.width % 2:
        raise ConfigError(f"an mp4 needs an even width and height, not {clip.width}x{clip.height}.")
    if clip.latent_shape.time < 2:
        raise ConfigError(
            f"clips of {clip.num_frames} frames are one latent frame, with nothing to generate."
        )
    check_writing()
    session.load()
    return session


async def serve(
    config: ServeConfig,
    session: Session,
    guardrail: Guardrail,
    notes: tuple[str, ...],
    bound: socket.socket,
    folder: Path,
    hand_out: Callable[[Callable[[], None]], None] = lambda end: None,
) -> None:
    """Answers at a bound socket until a signal comes.

    Args:
        config: of the service.
        session: opened and loaded; from here on the worker's.
        guardrail: likewise.
        notes: sentences for the page.
        bound: from ``bind``.
        folder: of the clips.
        hand_out: given what ends the service, to be called in its event loop.

    Raises:
        CosmosPosttrainError: generation ended by itself.
    """
    loop = asyncio.get_running_loop()
    metrics = Metrics()
    queue = JobQueue(config.max_queue, metrics)
    command = ClipCommand(config, session.tensor_model_parallel_size)
    worker = Worker(
        session,
        queue,
        guardrail,
        command,
        metrics,
        shows_frames=not config.offload_tokenizer,
        max_jobs=config.max_batch_size,
        on_end=lambda: _tell(loop, end),
    )
    desk = Desk(config, session, queue, metrics, folder, notes, worker.is_alive)
    server = _Server(
        uvicorn.Config(
            make_app(desk),
            log_level="warning",
            access_log=False,
            lifespan="off",
            ws="none",
            server_header=False,
            timeout_graceful_shutdown=_LAST_SECONDS,
        )
    )
    host, port = bound.getsockname()[:2]
    shown = f"[{host}]" if ":" in host else host
    server.ready = f"serving {session.name} at http://{shown}:{port}/ (Ctrl-C ends it)"

    def end() -> None:
        server.should_exit = True
        queue.close()

    def hurry() -> None:
        server.force_exit = server.should_exit  # at the second signal
        end()

    hand_out(end)
    with _signals(loop, hurry):
        worker.start()
        await server.serve([bound])
        await asyncio.to_thread(worker.join, _LAST_SECONDS)
    if worker.failure is not None:
        kind = type(worker.failure).__name__
        raise CosmosPosttrainError(f"generation ended with {kind}; start the service again.")


@contextlib.contextmanager
def _signals(loop: asyncio.AbstractEventLoop, end: Callable[[], None]) -> Iterator[None]:
    """Calls ``end`` on SIGTERM and Ctrl-C, where this is the main thread."""
    numbers = (signal.SIGTERM, signal.SIGINT)
    with contextlib.suppress(RuntimeError, ValueError):
        for number in numbers:
            loop.add_signal_handler(number, end)
    try:
        yield
    finally:
        with contextlib.suppress(RuntimeError, ValueError):
            for number in numbers:
                loop.remove_signal_handler(number)


def _tell(loop: asyncio.AbstractEventLoop, function: Callable[[], None]) -> None:
    with contextlib.suppress(RuntimeError):  # the loop has ended
        loop.call_soon_threadsafe(function)
