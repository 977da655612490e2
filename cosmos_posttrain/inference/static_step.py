"""A pass over a window whose shapes and addresses are the same every time: what a graph can replay.

Flows in: drafts in their buffers. Flows out: what was drawn behind them, the scores, and better
drafts, in buffers too. Nothing depends on a number that the host would have to know but the window
and the bucket: how much of the cache is looked at, with a mask of what is filled. Draws included,
the host waits for nothing; of windows it reads back how many tokens are right.

    drafts --tokens, places--> layers --scores--> draw --> drafts

Plain PyTorch on every device. ``cuda_graph.py`` captures it on a GPU.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from cosmos_posttrain.inference.decode_state import DecodeState, Places
from cosmos_posttrain.inference.decoding import Draw
from cosmos_posttrain.inference.drafts import Drafts
from cosmos_posttrain.inference.sampling import guide

# Runs a step of (window, blocks) as it is, or replays what it recorded of it.
Runner = Callable[[int, int], None]

# Positions whose values are summed together; a cache is some blocks, and a bucket as well.
BLOCK = 256
# A cache is looked at in so many steps: 1/16 of what is looked at is not filled, on average.
_NUM_BUCKETS = 8
# Scores of attention that are held at once, in float32.
_MAX_SCORES = 2**26


class StaticState(DecodeState):
    """A cache that goes on from another, written and read at places that a device knows.

    Few queries look at many keys: one kernel for each group of heads would leave most of a GPU
    idle, so that values are multiplied by blocks, which are summed.

    Args:
        state: fed with the prompt; its cache is copied, and let go.
        max_length: positions that the cache holds, rounded up to blocks.
        block: positions of a block.
    """

    def __init__(self, state: DecodeState, max_length: int, block: int = BLOCK) -> None:
        self.plan, self._rows, self._texts = state.plan, state._rows, state._texts
        self.block, self.num_blocks = block, -(-max_length // block)
        layers, batch, groups, _, width = state._values.shape
        filled = self.length = state.length
        shape = (layers, batch, groups, self.num_blocks * block, width)
        self._keys = state._keys.new_zeros(shape)
        self._keys[..., :filled, :] = state._keys[..., :filled, :]
        self._values = state._values.new_zeros(layers, self.num_blocks, batch, groups, block, width)
        for first in range(0, filled, block):
            part = state._values[..., first : min(first + block, filled), :]
            self._values[:, first // block, ..., : part.shape[-2], :] = part
        state._keys = state._values = self._keys.new_empty(0)

    def rehearse(self) -> None:
        """Runs what other ways of decoding do not have, on zeros that a pass will overwrite.

        Where it cannot run it fails here, before another rank waits for this one.
        """
        plan, filled = self.plan, self.length
        batch = len(self._rows)
        shape = (batch, 1, plan.groups, plan.heads_per_group + 1, plan.width)
        zeros = torch.zeros(shape, dtype=plan.dtype, device=plan.device)
        firsts = torch.full((batch, 1), filled, device=plan.device)
        places = self._places_at(firsts, 1, self.num_blocks * self.block)
        self._attended(0, zeros[..., 1:, :], zeros[..., 0, :], zeros[..., 0, :], places)

    def feed_at(self, tokens: Tensor, firsts: Tensor, num_blocks: int) -> Tensor:
        """Feeds tokens of clips that stand anywhere in the first blocks.

        Args:
            tokens: (B, N) int64.
            firsts: (B, 1) int64, where the first of each clip stands.
            num_blocks: that are looked at, all tokens' places among them.

        Returns:
            (B, N, vocab_size).
        """
        count = tokens.shape[1]
        return self._run(tokens, self._places_at(firsts, count, num_blocks * self.block), count)

    def _attended(
        self, number: int, query: Tensor, key: Tensor, value: Tensor, places: Places
    ) -> Tensor:
        assert places.numbers is not None and places.mask is not None
        keys, values = self._keys[number], self._values[number]
        keys[self._rows, :, places.numbers] = key
        block, place = places.numbers // self.block, places.numbers % self.block
        values[block, self._rows, :, place] = value
        batch, count, groups, heads, _ = query.shape
        keys = keys[:, :, : places.end].flatten(0, 1)
        values = values[: places.end // self.block].flatten(1, 2)
        most = max(1, _MAX_SCORES // (batch * groups * heads * places.end))
        parts = [
            _attend_by_blocks(part, keys, values, mask)
            for part, mask in zip(query.split(most, 1), places.mask.split(most, 3), strict=True)
        ]
        found = parts[0] if len(parts) == 1 else torch.cat(parts, 1)
        return found.reshape(batch * count, -1)


def _attend_by_blocks(query: Tensor, keys: Tensor, values: Tensor, mask: Tensor) -> Tensor:
    """``softmax(q k^T / sqrt(D)) v``, in float32 but for what is multiplied.

    Args:
        query: (B, N, groups, heads, D).
        keys: (B * groups, S, D).
        values: (blocks, B * groups, S / blocks, D).
        mask: (B, 1, 1, N, S), added to the scores.

    Returns:
        (B, N, groups, heads, D).
    """
    batch, count, groups, heads, width = query.shape
    blocks, rows, block, _ = values.shape
    grouped = query.permute(0, 2, 3, 1, 4).reshape(rows, heads * count, width)
    scores = _product(grouped, keys.transpose(1, 2)).view(batch, groups, heads, count, -1)
    weights = torch.add(mask, scores, alpha=width**-0.5).softmax(-1).to(values.dtype)
    weights = weights.view(rows, heads * count, blocks, block).permute(2, 0, 1, 3)
    found = _product(weights.reshape(blocks * rows, heads * count, block), values.flatten(0, 1))
    found = found.view(blocks, batch, groups, heads, count, width).sum(0)
    return found.permute(0, 3, 1, 2, 4).to(query.dtype)


def _product(a: Tensor, b: Tensor) -> Tensor:
    """(M, R, K) times (M, K, C) in float32, without rounding 16-bit sums where torch can."""
    if a.is_cuda and a.dtype != torch.float32 and "dtype" in torch.ops.aten.bmm.overloads():
        return torch.bmm(a, b, out_dtype=torch.float32)
    return torch.bmm(a, b).float()


class StaticPasses:
    """Passes of one shape for each window and bucket; see ``Passes``. Begin them with ``begin``.

    Making them sends nothing to other ranks, and fails where memory or a kernel is missing.

    Args:
        state: of the clips, twice as many with guidance.
        draw: of tokens, without waiting.
        drafts: of the clips.
        guidance_scale: see ``guide``; 1 is without.
        open_runner: makes what runs ``step``; by default that itself.
    """

    def __init__(
        self,
        state: StaticState,
        draw: Draw,
        drafts: Drafts,
        guidance_scale: float = 1.0,
        open_runner: Callable[[Runner], Runner] | None = None,
    ) -> None:
        self._state, self._draw, self._drafts = state, draw, drafts
        self._guidance_scale = guidance_scale
        batch, window = len(drafts.tokens), drafts.largest_window
        self._drawn = drafts.tokens.new_zeros(batch, window)
        dtype = state.plan.dtype if guidance_scale == 1 else torch.float32
        shape = (batch, window, state.plan.config.vocab_size)
        self._scores = torch.zeros(shape, dtype=dtype, device=self._drawn.device)
        self._bucket = -(-state.num_blocks // _NUM_BUCKETS)
        self._run = self.step if open_runner is None else open_runner(self.step)
        state.rehearse()

    def begin(self) -> None:
        """A first pass, of which nothing is kept; the tensor-parallel ranks make it together."""
        self._scores_of(*self._drafts.window(1))

    def __call__(self, count: int, known: list[int]) -> tuple[Tensor, Tensor, list[int]]:
        """See ``Passes``."""
        state, drafts = self._state, self._drafts
        blocks = -(-(max(known) - 1 + count) // state.block)
        blocks = min(-(-blocks // self._bucket) * self._bucket, state.num_blocks)
        self._run(count, blocks)
        if count == 1:  # nothing to ask for
            known = [min(number + 1, drafts.end) for number in known]
        else:
            known = drafts.known.flatten().tolist()
        return self._drawn[:, :count].clone(), self._scores[:, :count], known

    def step(self, count: int, num_blocks: int) -> None:
        """Feeds a window and takes in what is drawn; all results are left in buffers."""
        fed, places = self._drafts.window(count)
        found = self._scores_of(fed, places, num_blocks)
        drawn = self._draw(found, places + 1)
        self._drafts.take(fed, drawn, places)
        self._scores[:, :count] = found
        self._drawn[:, :count] = drawn

    def _scores_of(self, fed: Tensor, places: Tensor, num_blocks: int | None = None) -> Tensor:
        blocks = self._state.num_blocks if num_blocks is None else num_blocks
        if self._guidance_scale == 1:
            return self._state.feed_at(fed, places[:, :1], blocks)
        found = self._state.feed_at(fed.repeat(2, 1), places[:, :1].repeat(2, 1), blocks)
        return guide(found, self._guidance_scale)
