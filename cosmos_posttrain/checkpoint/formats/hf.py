"""``hf``: a folder for transformers: safetensors, ``config.json`` and the file that models them.

The weights' names and the fields of ``config.json`` are those of the ``safetensors`` format, which
this is with more beside it: what ``AutoModelForCausalLM`` needs (``auto_map``, the modelling file,
``generation_config.json``) and what the model was trained on (``context/data.json``). The modelling
file is written and never read: nothing in a folder is executed here.
"""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path
from typing import Any

from cosmos_posttrain.checkpoint import context
from cosmos_posttrain.checkpoint.formats import safetensors
from cosmos_posttrain.checkpoint.formats.base import Contents
from cosmos_posttrain.errors import CheckpointError
from cosmos_posttrain.files import write_json
from cosmos_posttrain.models.config import ModelConfig

MODEL_TYPE = "cosmos_ar"
MODELLING = Path(__file__).parents[1] / "modeling_cosmos_ar.py"
GENERATION = "generation_config.json"

_USAGE = """
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained("path/of/this/folder", trust_remote_code=True)
    clip = model.generate({inputs})

`tokens` (B, P) int64 are those of the clip's first latent frames{first}, in the order (t h w);
`clip` (B, {length}) is the whole one, by greedy decoding. All clips of a batch have equally many
given tokens.{text} Tested with transformers 4.57 and 5.23.
"""
_TEXT = (
    " `text` (B, {rows}, {width}) is the text encoder's output, zero rows behind the prompt: every "
    "row counts."
)


class HfFormat(safetensors.SafetensorsFormat):
    """A folder that ``AutoModelForCausalLM.from_pretrained`` loads."""

    library = "transformers"
    name = "hf"
    title = "a Hugging Face folder of this package"
    parts = (*safetensors.SafetensorsFormat.parts, MODELLING.name, GENERATION, "context")
    hub_files = (MODELLING.name, *safetensors.SafetensorsFormat.hub_files, "context/*")

    def detect(self, folder: Path) -> Path | None:
        if super().detect(folder) is None:
            return None
        try:
            values = context.read_json(folder / safetensors.CONFIG)
        except CheckpointError:
            return None  # the safetensors format says what is wrong with it
        return folder if values.get("model_type") == MODEL_TYPE else None

    def config(self, checkpoint: Path, named: ModelConfig | None) -> ModelConfig:
        config = super().config(checkpoint, named)
        values = context.read_json(checkpoint / safetensors.CONFIG) if named is None else {}
        # transformers writes what it saves in another dtype so, and leaves our own field alone.
        dtype = values.get("dtype") or values.get("torch_dtype") or config.params_dtype
        return dataclasses.replace(config, params_dtype=dtype)

    def data(self, checkpoint: Path) -> context.TrainingData | None:
        return context.read_data(checkpoint)

    def files(self, checkpoint: Path) -> list[Path]:
        return [*super().files(checkpoint), context.data_path(checkpoint)]

    def write(self, folder: Path, contents: Contents) -> None:
        super().write(folder, contents)
        write_json(folder / GENERATION, _generation(contents.config))
        shutil.copyfile(MODELLING, folder / MODELLING.name)
        if contents.data is not None:
            context.write_data(folder, contents.data)

    def config_json(self, config: ModelConfig) -> dict[str, Any]:
        classes = {"AutoConfig": "CosmosARConfig", "AutoModelForCausalLM": "CosmosARForCausalLM"}
        return super().config_json(config) | {
            "model_type": MODEL_TYPE,
            "architectures": [classes["AutoModelForCausalLM"]],
            "auto_map": {auto: f"{MODELLING.stem}.{name}" for auto, name in classes.items()},
            "torch_dtype": config.params_dtype,
            "tie_word_embeddings": False,
        }

    def usage(self, config: ModelConfig) -> str:
        text = config.is_video2world
        return _USAGE.format(
            inputs="tokens, encoder_hidden_states=text" if text else "tokens",
            first=f", `<bov>` ({config.bov_token}) before them" if text else "",
            length=config.num_clip_tokens,
            text=_TEXT.format(rows=config.context_len, width=config.context_dim) if text else "",
        )


def _generation(config: ModelConfig) -> dict[str, object]:
    """Greedy decoding of the whole clip, where a call says nothing else."""
    values: dict[str, object] = {"do_sample": False, "max_length": config.num_clip_tokens}
    if config.is_video2world:
        values |= {"bos_token_id": config.bov_token, "pad_token_id": config.pad_token}
    return values
