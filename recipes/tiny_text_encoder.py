"""Makes the text encoder that is shipped as ``tiny``: a random T5 encoder with a real tokenizer.

    python recipes/tiny_text_encoder.py [FOLDER]

The tokenizer's vocabulary is learned from captions of simple moving objects, which are made here,
and from ``tiny_text_encoder.txt``; what it does not cover is spelled in bytes. The weights are
drawn from a seed and never trained: they keep prompts apart, and know nothing of their meaning.
Run again, it writes the same files (with the versions of constraints.txt).
"""

from __future__ import annotations

import itertools
import json
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cosmos_posttrain.launch import run_cli

if TYPE_CHECKING:
    from torch import Tensor

TEXT_FILE = Path(__file__).with_suffix(".txt")
SHIPPED_FOLDER = (
    Path(__file__).resolve().parents[1] / "cosmos_posttrain" / "text" / "weights" / "tiny"
)

SPECIAL_TOKENS = ("<pad>", "</s>", "<unk>")  # T5's own, with T5's numbers
BYTE_TOKENS = tuple(f"<0x{byte:02X}>" for byte in range(256))
SEED = 1234
CONFIG = {
    "architectures": ["T5EncoderModel"],
    "model_type": "t5",
    "d_model": 64,
    "d_kv": 16,
    "num_heads": 4,
    "d_ff": 128,
    "num_layers": 2,
    "feed_forward_proj": "relu",
    "relative_attention_num_buckets": 16,
    "relative_attention_max_distance": 32,
    "n_positions": 32,  # what tiny-video2world takes
    "dropout_rate": 0.0,
    "layer_norm_epsilon": 1e-6,
    "is_encoder_decoder": False,
    "use_cache": False,
    "pad_token_id": 0,
    "eos_token_id": 1,
}
# Standard deviations. Attention and feed-forward add half of what a T5 begins its training with, so
# that a row still says above all which word it stands for.
SCALES = {
    "shared": 1.0,
    "relative_attention_bias": 0.5,
    "q": 1.0,
    "k": 1.0,
    "v": 1.0,
    "o": 0.5,
    "wi": 1.0,
    "wo": 0.5,
}

COLORS = "red green blue yellow orange purple cyan magenta white black brown pink gray".split()
OBJECTS = (
    "ball box cube disc ring star cross triangle square circle diamond block "
    "sphere cone cylinder object thing shape"
).split()
LOOKS = "plain striped dotted checkered textured shiny small large big tiny".split()
VERBS = (
    "moves rolls slides drifts flies goes glides travels runs heads floats falls rises "
    "bounces stops turns starts stays rests waits speeds slows"
).split()
PLACES = (
    "to the left,to the right,up,down,upwards,downwards,leftwards,rightwards,to the top,"
    "to the bottom,towards the left edge,towards the right edge,towards the upper edge,"
    "towards the lower edge,across the picture,behind the {other},in front of the {other},"
    "past the {other},away from the {other},into the corner,over the ground,off the wall,"
    "quickly to the left,slowly to the right,while the camera pans left,"
    "while the camera moves right,and stays still,then comes back,without stopping"
).split(",")
PATTERNS = (
    "the {color} {object} {verb} {place}",
    "a {look} {color} {object} {verb} {place}.",
    "There is a {color} {object}; it {verb} {place}.",
    "Push the {look} {object} {place}, and the {color} one {verb}.",
)


def captions() -> Iterator[str]:
    """About two thousand captions in which every word comes many times."""
    cycles = {
        "color": itertools.cycle(COLORS),
        "object": itertools.cycle(OBJECTS),
        "look": itertools.cycle(LOOKS),
        "verb": itertools.cycle(VERBS),
    }
    others = itertools.cycle(reversed(OBJECTS))
    for _ in range(17):
        for pattern, place in itertools.product(PATTERNS, PLACES):
            words = {name: next(cycle) for name, cycle in cycles.items()}
            yield pattern.format(place=place.format(other=next(others)), **words)


def make_tokenizer() -> str:
    """Learns the vocabulary; the contents of ``tokenizer.json``."""
    from tokenizers import (
        Tokenizer,
        decoders,
        models,
        normalizers,
        pre_tokenizers,
        processors,
        trainers,
    )

    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.WhitespaceSplit(),
            pre_tokenizers.Metaspace(prepend_scheme="always"),
            pre_tokenizers.Punctuation(),
            pre_tokenizers.Digits(individual_digits=True),
        ]
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", 1)]
    )
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=10_000,  # more than there is to learn: every word becomes one token
        special_tokens=[*SPECIAL_TOKENS, *BYTE_TOKENS],
        show_progress=False,
    )
    text = TEXT_FILE.read_text(encoding="utf-8").splitlines()
    tokenizer.train_from_iterator(itertools.chain(captions(), text), trainer)
    value = json.loads(tokenizer.to_str())
    # Bytes spell what has no token; written out in a prompt, <0x41> is a text like any other.
    value["added_tokens"] = [
        item for item in value["added_tokens"] if item["content"] in SPECIAL_TOKENS
    ]
    return json.dumps(value, ensure_ascii=False)


def make_tensors(config: dict[str, Any]) -> dict[str, Tensor]:
    """Draws the weights."""
    import torch
    from transformers import T5Config, T5EncoderModel

    with torch.device("meta"):
        names = T5EncoderModel(T5Config(**config)).state_dict()
    generator = torch.Generator().manual_seed(SEED)
    tensors = {}
    for name, tensor in sorted(names.items()):
        kind = name.split(".")[-2]
        if name == "encoder.embed_tokens.weight":
            continue  # the same tensor as shared.weight
        if kind.endswith("layer_norm"):
            tensors[name] = torch.ones(tensor.shape)
            continue
        std = SCALES[kind]
        if kind not in ("shared", "relative_attention_bias"):
            std /= math.sqrt(tensor.shape[1])  # of the numbers that come in
        if kind == "q":
            std /= math.sqrt(config["d_kv"])  # T5 does not scale its scores
        tensors[name] = torch.randn(tensor.shape, generator=generator) * std
    return tensors


def main() -> None:
    """Writes the encoder's folder."""
    from cosmos_posttrain.text.convert import write_description
    from cosmos_posttrain.text.weights_io import SAFETENSORS_FILES, write_part

    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else SHIPPED_FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = make_tokenizer()
    config = CONFIG | {"vocab_size": len(json.loads(tokenizer)["model"]["vocab"])}
    write_part(folder / SAFETENSORS_FILES[0], make_tensors(config))
    write_description(folder, config, tokenizer, "float32")
    print(f"wrote {folder}: {config['vocab_size']} tokens, random weights from seed {SEED}.")


if __name__ == "__main__":
    run_cli(main)
