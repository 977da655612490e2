"""The processes that share the model of a service: the first is asked, all generate.

Flows in: on the first rank, requests. Flows out: on every rank the same requests, at the same time,
and the same answer to whether they are still wanted. A group of one talks to nobody.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from cosmos_posttrain.distributed import groups
from cosmos_posttrain.errors import CosmosPosttrainError
from cosmos_posttrain.inference.request import GeneratedClip, Request
from cosmos_posttrain.inference.session import Session

# The first rank says at least so often that there is nothing to do: those that wait for it would
# give up after an hour.
IDLE_SECONDS = 30.0


class NotWantedError(CosmosPosttrainError):
    """Nobody wants the clips any more that are being generated."""


@dataclass(frozen=True)
class Round:
    """What all ranks do next.

    Attributes:
        requests: to generate together; none where there is nothing to do.
        is_last: the service ends.
    """

    requests: Sequence[Request] = ()
    is_last: bool = False


def agree(now: Round | None = None) -> Round:
    """The first rank's next round, on every rank."""
    return groups.decide(lambda: Round() if now is None else now)


def generate(
    session: Session,
    requests: Sequence[Request],
    is_wanted: Callable[[], bool] = lambda: True,
    on_tokens: Callable[[int, Tensor], None] = lambda number, tokens: None,
) -> list[GeneratedClip]:
    """Generates clips, on all ranks together.

    Args:
        session: of all ranks.
        requests: the same on all of them.
        is_wanted: asked on the first rank at the end of each latent frame.
        on_tokens: as ``Session.generate_many`` calls it.

    Raises:
        NotWantedError: on all ranks, soon after ``is_wanted`` says so.
        CosmosPosttrainError: on all ranks, what ``Session.generate_many`` raises.
    """

    def look(number: int, tokens: Tensor) -> None:
        if groups.any_rank(int(not is_wanted())):
            raise NotWantedError("nobody wants the clip any more.")
        on_tokens(number, tokens)

    return session.generate_many(requests, on_tokens=look)


def follow(session: Session) -> None:
    """Does what the first rank does, until it ends."""
    while not (now := agree()).is_last:
        if now.requests:
            try:
                generate(session, now.requests)
            except CosmosPosttrainError:
                pass  # the first rank has met the same and says it
            finally:
                if torch.cuda.is_available():
                    torch.cuda.empty_cache()
