"""Whether data, model and settings of a run go together where text is concerned.

Flows in: the settings, the data's contract and the model's. Flows out: nothing, or one sentence.
"""

from __future__ import annotations

from cosmos_posttrain.checkpoint.source import CheckpointSource
from cosmos_posttrain.data.contract import Contract
from cosmos_posttrain.data.dataset import TokenDataset
from cosmos_posttrain.errors import ConfigError
from cosmos_posttrain.training.config import TrainConfig


def check_data(config: TrainConfig, data: TokenDataset, takes_text: bool) -> None:
    """Refuses data of the other kind than the script's, and settings that it does not allow.

    Raises:
        ConfigError: one sentence.
    """
    path, has_text = config.data.sources, _text_contract(data) is not None
    if has_text and not takes_text:
        raise ConfigError(
            f"{path} holds clips with prompts, which base models do not take; train on it with "
            "train_video2world.py, or prepare it without --text_encoder_path."
        )
    if takes_text and not has_text:
        raise ConfigError(
            f"{path} holds clips without prompts; prepare it with --text_encoder_path, or train a "
            "base model on it with train_general.py."
        )
    if config.prompt_dropout and not takes_text:
        raise ConfigError(
            f"--prompt_dropout {config.prompt_dropout} has no effect on data without prompts; "
            "leave it out."
        )
    num_given, num_latents = config.num_condition_latents, data.latent_shape[0]
    if num_given >= num_latents:
        raise ConfigError(
            f"--num_condition_latents {num_given} leaves nothing to predict of clips of "
            f"{num_latents} latent frames; give fewer."
        )


def checked_source(source: CheckpointSource, data: TokenDataset) -> CheckpointSource:
    """The model to start from, with a text of the data's size if its weights are fresh.

    Raises:
        ConfigError: it takes a text and the data has none, or the other way round, or one of
            another size or text encoder.
    """
    contract, model = _text_contract(data), source.config
    if contract is None:
        if model.is_video2world:
            raise ConfigError(
                "the model takes a text, but the data set has no prompts; start from a base model, "
                "or prepare the data with --text_encoder_path and use train_video2world.py."
            )
        return source
    text, context_len = contract.text_encoder, contract.context_len
    assert text is not None and context_len is not None
    if not model.is_video2world:
        raise ConfigError(
            "the model takes no text, but the data set has prompts; start from a Video2World model "
            "with --model_path."
        )
    source = source.for_text(context_len, text.width)
    wanted = source.config.context_len, source.config.context_dim
    if wanted != (context_len, text.width):
        raise ConfigError(
            f"the model takes a text of {wanted[0]} rows of {wanted[1]} numbers, but the data "
            f"set's has {context_len} of {text.width}; prepare it with the model's text encoder."
        )
    known = source.contract.text_encoder if source.contract is not None else None
    if known is not None and known.sha256 != text.sha256:
        raise ConfigError(
            f"the model knows the text encoder {known.id}, but the data set's prompts were encoded "
            f"by another, {text.id}; prepare it with the model's."
        )
    return source


def _text_contract(data: TokenDataset) -> Contract | None:
    """The data's contract if it has prompts."""
    contract = None if data.manifest is None else data.manifest.contract
    return None if contract is None or contract.text_encoder is None else contract
