"""Clips continued by the model that is being trained, where it is and as it is.

Flows in: the model and clips of a split. Flows out, on every rank: ``ContinuedClip``s, tokens
(T, H, W) of the truth, of what the model makes of its first latent frames, and of what it takes for
the most likely token behind true ones. Weights, gradients and random numbers stay as they are.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from megatron.core.distributed import DistributedDataParallel
from torch import Tensor

from cosmos_posttrain.data.batch import SequenceLayout
from cosmos_posttrain.data.dataset import TokenDataset
from cosmos_posttrain.distributed import groups
from cosmos_posttrain.errors import ConfigError, CosmosPosttrainError, UserError
from cosmos_posttrain.inference.engine import generate
from cosmos_posttrain.models.ar_model import ARModel
from cosmos_posttrain.models.builder import CosmosGPTModel
from cosmos_posttrain.training.building import gather_parameters
from cosmos_posttrain.training.scores import gather_clips, guess_batch

# As infer.py draws, and always the same draws: samples differ by what was learnt.
_TEMPERATURE, _TOP_P, _SEED = 1.0, 0.8, 0


@dataclass(frozen=True)
class ContinuedClip:
    """One clip, (T, H, W) int64 each, on the CPU.

    Attributes:
        number: in the split.
        truth: its tokens.
        generated: the given frames, and what the model made of them.
        preview: the given frames, and the most likely token of each place behind true ones.
    """

    number: int
    truth: Tensor
    generated: Tensor
    preview: Tensor


def num_given_latents(num_condition_latents: int, num_latents: int) -> int:
    """Latent frames that samples begin with: those without a loss, else the first one.

    Raises:
        ConfigError: nothing is left to generate.
    """
    given = max(num_condition_latents, 1)
    if given >= num_latents:
        raise ConfigError(
            f"of {num_latents} latent frames {given} are given, which leaves no frame to generate; "
            "leave out --sample_every_n_steps, or train on longer clips."
        )
    return given


@contextlib.contextmanager
def _as_it_comes() -> Iterator[None]:
    """Decoding adds up probabilities by a function that has no deterministic form on a GPU."""
    was_asked = torch.are_deterministic_algorithms_enabled()
    only_warned = torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(False)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(was_asked, warn_only=only_warned)


class SampleMaker:
    """Continues the first clips of a split; data-parallel ranks share them out.

    Args:
        ddp: the model.
        dataset: the split.
        layout: of the model's sequences.
        num_clips: at most.
        num_given: latent frames that are given of each.
    """

    def __init__(
        self,
        ddp: DistributedDataParallel,
        dataset: TokenDataset,
        layout: SequenceLayout,
        num_clips: int,
        num_given: int,
    ) -> None:
        self._ddp, self._dataset, self._layout = ddp, dataset, layout
        self._num_clips = min(num_clips, len(dataset))
        self._num_given = num_given * dataset.latent_shape.tokens_per_frame

    def make(self, tell: Callable[[str], None] = lambda place: None) -> list[ContinuedClip]:
        """The clips as the model continues them now; every rank calls it.

        Args:
            tell: called before each clip, as often on every rank.

        Raises:
            UserError: on every rank, where one could not generate its clips.
            CosmosPosttrainError: the model's scores are not finite.
        """
        rank, num_ranks = groups.data_parallel_place()
        each = -(-self._num_clips // num_ranks)
        own = [min(rank * each + place, self._num_clips - 1) for place in range(each)]
        device = next(self._ddp.module.parameters()).device
        gather_parameters(self._ddp)
        self._ddp.eval()
        rows, problem = [], ""
        try:
            with torch.random.fork_rng([device] if device.type == "cuda" else []), _as_it_comes():
                for place, number in enumerate(own):
                    tell(f"sample {place + 1} of {each}")
                    rows.append(torch.stack(self._tokens(number)).cpu().numpy())
        except (CosmosPosttrainError, RuntimeError) as error:  # no room on the GPU, say
            problem = str(error) or repr(error)
        self._ddp.train()
        if device.type == "cuda":
            torch.cuda.empty_cache()  # or its blocks would lie between those of a step
        if groups.any_rank(int(bool(problem))):
            raise UserError(problem or "another rank could not generate its clips.")
        shape = tuple(self._dataset.latent_shape)
        found = torch.from_numpy(gather_clips(np.stack(rows))).view(-1, 3, *shape)
        return [ContinuedClip(number, *found[number]) for number in range(self._num_clips)]

    def _tokens(self, number: int) -> tuple[Tensor, Tensor, Tensor]:
        """(T * H * W,) each: truth, generated, preview."""
        model: CosmosGPTModel = self._ddp.module
        truth, context = self._dataset[number], self._dataset.context(number)
        texts = None if context is None else context[None]
        prefix, given = self._layout.prefix, self._num_given
        prompt = torch.cat([torch.tensor(prefix, dtype=truth.dtype), truth[:given]])
        made = generate(
            ARModel(model),
            prompt[None],
            len(truth) - given,
            temperature=_TEMPERATURE,
            top_p=_TOP_P,
            seed=_SEED,
            items=[number],
            context=texts,
            # Only the modules themselves know of LoRA's factors.
            decoding="auto" if model.model_config.lora is None else "modules",
            cuda_graphs=False,  # their memory would stay
        )
        batch = self._layout.batch(truth[None], torch.ones(1), texts)
        first = len(prefix) + given - 1  # the position that predicts the first token not given
        guesses = guess_batch(model, batch)[0, first : first + len(truth) - given]
        begin = truth[:given]
        return truth, torch.cat([begin, made[0].cpu()]), torch.cat([begin, guesses.cpu()])
