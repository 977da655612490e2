"""What a session is opened from, and what ``infer.py`` can be told; flags and checks. No torch.

Flows in: defaults < YAML < flags < overrides (``cli.py``). Flows out: a ``SessionConfig``, which
every room that generates embeds in its own config with ``SESSION_FLAGS``, or an ``InferConfig``.
Fields stay as they were given; a ``Session`` fills in what follows from the checkpoint.
"""

from __future__ import annotations

from dataclasses import dataclass

from cosmos_posttrain.cli import Flag, flag_names
from cosmos_posttrain.config import check, setting
from cosmos_posttrain.launch import DTYPES
from cosmos_posttrain.models.config import LAYER_SPECS, ROPE_SCALINGS

INPUT_TYPES = ("video", "image")
# Of Video2World models.
_TEXT_INPUT_TYPES = ("text_and_video", "text_and_image")
# torch's generators take seeds up to this.
_SEED_LIMIT = 2**63


@dataclass
class SessionConfig:
    """A model, its tokenizer, and the size of the clips.

    Attributes:
        ar_model_dir: the model: checkpoint, run folder, folder with model.pt, Hugging Face id, or
            random:tiny.
        checkpoint_dir: where bare names of models and tokenizers are looked up.
        encoder_path: the tokenizer; by default the one that the checkpoint was trained with.
        decoder_path: the tokenizer's decoder; by default that of --encoder_path.
        tokenizer_compression_factor: T,H,W such as 4,8,8; by default the tokenizer's own.
        width: pixels; by default the checkpoint's, as for the next two.
        height: pixels.
        num_context_frames: frames of the whole clip, given and generated.
        tensor_model_parallel_size: processes that share the model; by default all that torchrun
            started.
        layer_spec: layers of the model.
        dtype: of the model; by default the checkpoint's on a GPU and float32 on the CPU.
        rope_scaling: positions where the clip's grid is larger than the checkpoint's.
        rope_scale: replaces the ratio of the two grids.
        allow_tokenizer_mismatch: run with another tokenizer or geometry than the checkpoint's.
        offload_ar_model: keep the model on the GPU while it generates, else on the CPU.
        offload_tokenizer: free the tokenizer while tokens are generated.
    """

    ar_model_dir: str = "Cosmos-1.0-Autoregressive-4B"
    checkpoint_dir: str = "checkpoints"
    encoder_path: str | None = None
    decoder_path: str | None = None
    tokenizer_compression_factor: str | None = None
    width: int | None = setting(None, at_least=1)
    height: int | None = setting(None, at_least=1)
    num_context_frames: int | None = setting(None, at_least=1)
    tensor_model_parallel_size: int | None = setting(None, at_least=1)
    layer_spec: str = setting("torch", choices=LAYER_SPECS)
    dtype: str | None = setting(None, choices=DTYPES)
    rope_scaling: str = setting("none", choices=ROPE_SCALINGS)
    rope_scale: float | None = setting(None, at_least=1)
    allow_tokenizer_mismatch: bool = False
    offload_ar_model: bool = False
    offload_tokenizer: bool = False


@dataclass
class InferConfig(SessionConfig):
    """A run of ``infer.py``: a session, its inputs, and where the clips go.

    Attributes:
        input_type: video (its first frames are given) or image.
        input_image_or_video_path: the image, or the video whose first frames are given.
        batch_input_path: jsonl with one {"visual_input": PATH} a line, relative to the jsonl;
            outputs are named after the inputs, and those that are complete already are skipped.
        num_input_frames: frames that are given; by default 9, and 1 for an image.
        video_save_name: output of a single run; a bare name lies in --video_save_folder.
        video_save_folder: folder of the outputs.
        fps: frames a second of the output; by default the input's, for an image 25.
        temperature: 0 takes the most likely token each time.
        top_p: draw among the most likely tokens that hold this much probability.
        top_k: draw among this many most likely tokens; by default all.
        seed: of the sampling, the same for every input.
        disable_diffusion_decoder: decode with the discrete tokenizer, the only decoder here.
        overwrite: replace existing outputs.
        offload_guardrail_models: accepted for old commands, there is no such model here.
        offload_diffusion_decoder: accepted for old commands, there is no such model here.
        offload_prompt_upsampler: accepted for old commands, there is no such model here.
        offload_text_encoder_model: accepted for old commands, there is no such model here.
    """

    input_type: str = "video"
    input_image_or_video_path: str | None = None
    batch_input_path: str | None = None
    num_input_frames: int | None = setting(None, at_least=1)
    video_save_name: str = "output"
    video_save_folder: str = "outputs/"
    fps: float | None = setting(None, above=0, below=1000)
    temperature: float = setting(1.0, at_least=0)
    top_p: float | None = setting(0.8, at_least=0, at_most=1)
    top_k: int | None = setting(None, at_least=1)
    seed: int = setting(0, at_least=0, below=_SEED_LIMIT)
    disable_diffusion_decoder: bool = False
    overwrite: bool = False
    offload_guardrail_models: bool = False
    offload_diffusion_decoder: bool = False
    offload_prompt_upsampler: bool = False
    offload_text_encoder_model: bool = False


SESSION_FLAGS = (
    Flag("--ar_model_dir"),
    Flag("--checkpoint_dir"),
    Flag("--encoder_path"),
    Flag("--decoder_path"),
    Flag("--tokenizer_compression_factor"),
    Flag("--width"),
    Flag("--height"),
    Flag("--num_context_frames"),
    Flag("--tensor_model_parallel_size"),
    Flag("--layer_spec"),
    Flag("--dtype"),
    Flag("--rope_scaling"),
    Flag("--rope_scale"),
    Flag("--allow_tokenizer_mismatch"),
    Flag("--offload_ar_model"),
    Flag("--offload_tokenizer"),
)

FLAGS = (
    Flag("--input_type"),
    Flag("--input_image_or_video_path"),
    Flag("--batch_input_path", aliases=("--input_prompts_path",)),
    Flag("--num_input_frames"),
    Flag("--video_save_name"),
    Flag("--video_save_folder"),
    Flag("--fps"),
    Flag("--temperature"),
    Flag("--top_p"),
    Flag("--top_k"),
    Flag("--seed"),
    *SESSION_FLAGS,
    Flag("--disable_diffusion_decoder"),
    Flag("--overwrite"),
    Flag("--offload_guardrail_models"),
    Flag("--offload_diffusion_decoder"),
    Flag("--offload_prompt_upsampler"),
    Flag("--offload_text_encoder_model"),
)


def validate(config: InferConfig) -> None:
    """Lists every problem that no checkpoint could make right, at once; changes nothing.

    Raises:
        ConfigError: one sentence with all of them.
    """
    problems = []
    if config.input_type in _TEXT_INPUT_TYPES:
        problems.append(
            f"--input_type {config.input_type} needs a Video2World model, which this version does "
            "not generate with; use --input_type video or image"
        )
    elif config.input_type not in INPUT_TYPES:
        problems.append(
            f"there is no --input_type {config.input_type!r}; use {' or '.join(INPUT_TYPES)}"
        )
    if (config.input_image_or_video_path is None) == (config.batch_input_path is None):
        problems.append(
            "give either --input_image_or_video_path (one input) or --batch_input_path (a jsonl)"
        )
    if config.input_type == "image" and config.num_input_frames not in (None, 1):
        problems.append(
            f"--num_input_frames {config.num_input_frames} does not fit --input_type image, which "
            "gives 1 frame; leave it out"
        )
    check(config, flag_names(FLAGS), problems)
