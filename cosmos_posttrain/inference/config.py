"""Settings and flags of ``infer.py``. No torch.

Flows in: the command line. Flows out: an ``InferConfig``, field by field as it was given; ``plan``
fills in what follows from the checkpoint.
"""

from __future__ import annotations

from dataclasses import dataclass

from cosmos_posttrain.cli import Flag
from cosmos_posttrain.config import setting
from cosmos_posttrain.launch import DTYPES
from cosmos_posttrain.models.config import LAYER_SPECS, ROPE_SCALINGS


@dataclass
class InferConfig:
    """Everything that ``infer.py`` can be told.

    Attributes:
        input_type: ``video`` (its first frames are given) or ``image``.
        input_image_or_video_path: the input of a single run.
        batch_input_path: jsonl with ``{"visual_input": PATH}`` lines, instead of a single input.
        ar_model_dir: the model: a checkpoint or run folder, a folder with ``model.pt``, a Hugging
            Face id, ``random:tiny``.
        checkpoint_dir: folder in which bare names of models and tokenizers are looked up.
        encoder_path: the tokenizer; None means the one that the checkpoint was trained with.
        decoder_path: None means ``encoder_path``.
        tokenizer_compression_factor: T,H,W, checked against the tokenizer; None takes its own.
        width: pixels; None means the checkpoint's own, as for the next two.
        height: pixels.
        num_context_frames: frames of the whole clip, given and generated.
        num_input_frames: frames that are given; None means 9, and 1 for an image.
        video_save_name: the mp4 of a single run; with folders in it, used as it is.
        video_save_folder: folder of the outputs.
        fps: frames a second of the output; None means the input's (25 for an image).
        temperature: 0 is greedy.
        top_p: nucleus sampling.
        top_k: draws among this many tokens; None means all.
        seed: of the sampling, the same for every input.
        tensor_model_parallel_size: None means the number of processes that were started.
        layer_spec: ``torch`` or ``te``.
        dtype: None means the checkpoint's own on a GPU and float32 on the CPU.
        rope_scaling: ``none``, ``interpolate`` or ``yarn``, where the clip's grid is larger than
            the checkpoint's.
        rope_scale: replaces the ratio of the two grids.
        disable_diffusion_decoder: says that the discrete tokenizer shall decode, as it always does.
        allow_tokenizer_mismatch: run with another tokenizer or geometry than the checkpoint's.
        overwrite: replace existing outputs.
        offload_ar_model: keep the model on the CPU while clips are decoded.
        offload_tokenizer: free the tokenizer while tokens are generated.
        offload_guardrail_models: accepted, without effect.
        offload_diffusion_decoder: accepted, without effect.
        offload_prompt_upsampler: accepted, without effect.
        offload_text_encoder_model: accepted, without effect.
    """

    input_type: str = "video"
    input_image_or_video_path: str | None = None
    batch_input_path: str | None = None
    ar_model_dir: str = "Cosmos-1.0-Autoregressive-4B"
    checkpoint_dir: str = "checkpoints"
    encoder_path: str | None = None
    decoder_path: str | None = None
    tokenizer_compression_factor: str | None = None
    width: int | None = None
    height: int | None = None
    num_context_frames: int | None = None
    num_input_frames: int | None = None
    video_save_name: str = "output"
    video_save_folder: str = "outputs/"
    fps: float | None = None
    temperature: float = 1.0
    top_p: float | None = 0.8
    top_k: int | None = None
    seed: int = 0
    tensor_model_parallel_size: int | None = None
    layer_spec: str = setting("torch", choices=LAYER_SPECS)
    dtype: str | None = setting(None, choices=DTYPES)
    rope_scaling: str = setting("none", choices=ROPE_SCALINGS)
    rope_scale: float | None = None
    disable_diffusion_decoder: bool = False
    allow_tokenizer_mismatch: bool = False
    overwrite: bool = False
    offload_ar_model: bool = False
    offload_tokenizer: bool = False
    offload_guardrail_models: bool = False
    offload_diffusion_decoder: bool = False
    offload_prompt_upsampler: bool = False
    offload_text_encoder_model: bool = False


def _flag(name: str, help: str, *aliases: str) -> Flag:
    return Flag(f"--{name}", name, help, aliases)


_NO_OBJECT = "accepted for old commands, without effect: there is no such model here"

FLAGS = (
    _flag("input_type", "video or image"),
    _flag("input_image_or_video_path", "the image, or the video whose first frames are given"),
    _flag(
        "batch_input_path",
        'jsonl with one {"visual_input": PATH} a line, relative to the jsonl; outputs are named '
        "after the inputs, and those that are there already are skipped",
        "--input_prompts_path",
    ),
    _flag("ar_model_dir", "checkpoint, run folder, folder with model.pt, or Hugging Face id"),
    _flag("checkpoint_dir", "where bare names of models and tokenizers are looked up"),
    _flag("encoder_path", "the tokenizer (default: the one that the checkpoint was trained with)"),
    _flag("decoder_path", "the tokenizer's decoder (default: that of --encoder_path)"),
    _flag("tokenizer_compression_factor", "T,H,W such as 4,8,8 (default: the tokenizer's own)"),
    _flag("width", "pixels (default: the checkpoint's, as for the next two)"),
    _flag("height", "pixels"),
    _flag("num_context_frames", "frames of the whole clip, given and generated"),
    _flag("num_input_frames", "frames that are given (default: 9, for an image 1)"),
    _flag("video_save_name", "output of a single run; a bare name lies in --video_save_folder"),
    _flag("video_save_folder", "folder of the outputs"),
    _flag("fps", "frames a second of the output (default: the input's, for an image 25)"),
    _flag("temperature", "0 takes the most likely token each time"),
    _flag("top_p", "draw among the most likely tokens that hold this much probability"),
    _flag("top_k", "draw among this many most likely tokens (default: all)"),
    _flag("seed", "of the sampling"),
    _flag(
        "tensor_model_parallel_size",
        "processes that share the model (default: all that torchrun started)",
    ),
    _flag("layer_spec", "layers of the model"),
    _flag("dtype", "bfloat16 or float32 (default: the checkpoint's on a GPU, float32 on the CPU)"),
    _flag("rope_scaling", "positions beyond the checkpoint's grid"),
    _flag("rope_scale", "replaces the ratio of the two grids"),
    _flag("disable_diffusion_decoder", "decode with the discrete tokenizer, the only decoder here"),
    _flag("allow_tokenizer_mismatch", "run with another tokenizer or geometry than was trained"),
    _flag("overwrite", "replace existing outputs"),
    _flag("offload_ar_model", "move the model to the CPU while a clip is decoded"),
    _flag("offload_tokenizer", "free the tokenizer while tokens are generated"),
    _flag("offload_guardrail_models", _NO_OBJECT),
    _flag("offload_diffusion_decoder", _NO_OBJECT),
    _flag("offload_prompt_upsampler", _NO_OBJECT),
    _flag("offload_text_encoder_model", _NO_OBJECT),
)
