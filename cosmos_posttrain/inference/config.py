"""What a session is opened from, and what ``infer.py`` can be told; flags and checks. No torch.

Flows in: defaults < YAML < flags < overrides (``cli.py``). Flows out: a ``SessionConfig``, which
every room that generates embeds in its own config with ``SESSION_FLAGS``, or an ``InferConfig``.
Fields stay as they were given; a ``Session`` fills in what follows from the checkpoint.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from cosmos_posttrain import launch
from cosmos_posttrain.cli import Flag, flag_names
from cosmos_posttrain.config import check, setting
from cosmos_posttrain.launch import DTYPES
from cosmos_posttrain.models.config import LAYER_SPECS, ROPE_SCALINGS
from cosmos_posttrain.text.prompts import prompt_problem
from cosmos_posttrain.text.shipped import TEXT_ENCODER_DTYPES

# Of base models, and of Video2World models.
PLAIN_INPUT_TYPES = ("video", "image")
TEXT_INPUT_TYPES = ("text_and_video", "text_and_image")
IMAGE_INPUT_TYPES = ("image", "text_and_image")
TOKENS = "tokens"
INPUT_TYPES = (*PLAIN_INPUT_TYPES, *TEXT_INPUT_TYPES, TOKENS)
# Ways to decode; they differ in speed alone.
DECODINGS = ("auto", "sequential", "jacobi", "modules")
QUANTIZATIONS = ("int8",)
# torch's generators take seeds up to this.
_SEED_LIMIT = 2**63


@dataclass
class SessionConfig:
    """A model, its tokenizer and text encoder, and the size of the clips.

    Attributes:
        ar_model_dir: the model: checkpoint, run folder, folder with model.pt, Hugging Face id, or
            random:tiny.
        checkpoint_dir: where bare names of models and tokenizers are looked up.
        encoder_path: the tokenizer; by default the one that the checkpoint was trained with.
        decoder_path: the tokenizer's decoder; by default that of --encoder_path.
        text_encoder_path: T5 encoder of a Video2World model (folder, Hugging Face id, or tiny); by
            default the one that the checkpoint was trained with.
        text_encoder_dtype: in which it computes; by default its own on a GPU and float32 on the
            CPU.
        tokenizer_compression_factor: T,H,W such as 4,8,8; by default the tokenizer's own.
        width: pixels; by default the checkpoint's, as for the next two.
        height: pixels.
        num_context_frames: frames of the whole clip, given and generated.
        tensor_model_parallel_size: processes that share the model; by default all that torchrun
            started.
        layer_spec: layers of the model.
        dtype: of the model; by default the checkpoint's on a GPU and float32 on the CPU.
        decoding: how tokens are found, the same ones by each way: sequential, one after another;
            jacobi, a window of drafts at a time; modules, one after another through Megatron's own
            modules, slow; auto, the fastest.
        decoding_window: tokens that jacobi feeds at once; by default chosen from pass to pass, by
            how many of them are right.
        cuda_graphs: on a GPU, record passes as CUDA graphs and replay them, for speed alone.
        quantization: int8 keeps the layers' matrices as whole numbers of 8 bits, for memory; needs
            torchao.
        rope_scaling: positions where the clip's grid is larger than the checkpoint's.
        rope_scale: replaces the ratio of the two grids.
        allow_tokenizer_mismatch: run with another tokenizer, text encoder or geometry than the
            checkpoint's.
        offload_ar_model: keep the model on the GPU while it generates, else on the CPU.
        offload_tokenizer: free the tokenizer while tokens are generated.
        offload_text_encoder_model: free the text encoder when the prompts are encoded.
    """

    ar_model_dir: str = "Cosmos-1.0-Autoregressive-4B"
    checkpoint_dir: str = "checkpoints"
    encoder_path: str | None = None
    decoder_path: str | None = None
    text_encoder_path: str | None = None
    text_encoder_dtype: str | None = setting(None, choices=TEXT_ENCODER_DTYPES)
    tokenizer_compression_factor: str | None = None
    width: int | None = setting(None, at_least=1)
    height: int | None = setting(None, at_least=1)
    num_context_frames: int | None = setting(None, at_least=1)
    tensor_model_parallel_size: int | None = setting(None, at_least=1)
    layer_spec: str = setting("torch", choices=LAYER_SPECS)
    dtype: str | None = setting(None, choices=DTYPES)
    decoding: str = setting("auto", choices=DECODINGS)
    decoding_window: int | None = setting(None, at_least=2)
    cuda_graphs: bool = True
    quantization: str | None = setting(None, choices=QUANTIZATIONS)
    rope_scaling: str = setting("none", choices=ROPE_SCALINGS)
    rope_scale: float | None = setting(None, at_least=1)
    allow_tokenizer_mismatch: bool = False
    offload_ar_model: bool = False
    offload_tokenizer: bool = False
    offload_text_encoder_model: bool = False


@dataclass
class InferConfig(SessionConfig):
    """A run of ``infer.py``: a session, its inputs, and where the clips go.

    Attributes:
        input_type: video (its first frames are given) or image, for a Video2World model
            text_and_video or text_and_image, or tokens; by default as the input and the model are.
        input_image_or_video_path: the image, or the video whose first frames are given.
        prompt: what is to be seen, for a Video2World model; of a folder, the same for all.
        negative_prompt: what is not; guidance leads away from it, by default from no text at all.
        guidance_scale: how much the text counts; 1.0 is the model as it is, above it twice the
            computation.
        batch_input_path: a folder of images and videos, or a jsonl with one
            {"visual_input": PATH} a line, relative to the jsonl or the working folder, and with
            "prompt" for a Video2World model; outputs are named after the inputs, and those that
            are complete already are skipped.
        input_tokens_dir: folder of tokens: prepared by prepare_dataset.py, or of the 1X World Model
            Challenge as 1X ships it; the first latent frames of each clip are given.
        item: only this input of a list, counted from 0; a single input is number 0 unless told.
        max_clips: so many clips of --input_tokens_dir at most, spread evenly; by default all.
        num_input_frames: frames that are given; by default 9, and 1 for an image.
        num_samples: clips of each input, with random numbers of their own.
        sample: only this one of them, counted from 0.
        num_rollout_chunks: lengths of the model's clip, one continuing the other.
        rollout_overlap: latent frames at the end of what is there that each further chunk is given;
            by default as many as the first chunk was given, the anchor counted in.
        rollout_anchor: also give each further chunk the clip's first latent frame.
        batch_size: clips that are generated together.
        video_save_name: output of a single run; a bare name lies in --video_save_folder.
        video_save_folder: folder of the outputs.
        save_tokens: also write each clip's tokens, NAME.tokens.npy.
        save_log_probs: also write the log-probability of each token, NAME.log_probs.npy.
        side_by_side: also write each clip beside the truth, NAME.side_by_side.mp4.
        fps: frames a second of the output; by default the input's, for an image 25.
        temperature: 0 takes the most likely token each time.
        top_p: draw among the most likely tokens that hold this much probability.
        top_k: draw among this many most likely tokens; by default all.
        seed: of the sampling, the same for every input.
        num_gpus: processes that share the model, as --tensor_model_parallel_size.
        disable_diffusion_decoder: decode with the discrete tokenizer, the only decoder here.
        guardrail_dir: folder with the guardrail's weights; without it nothing is checked.
        disable_guardrail: check nothing, and do not say so.
        overwrite: replace existing outputs.
        only_eval: of evaluate.py onex, which scores tokens and makes no videos; refused here.
        offload_guardrail_models: free the guardrail's models while others work.
        offload_diffusion_decoder: accepted for old commands, there is no such model here.
        offload_prompt_upsampler: accepted for old commands, there is no such model here.
    """

    input_type: str | None = setting(None, choices=INPUT_TYPES)
    input_image_or_video_path: str | None = None
    prompt: str | None = None
    negative_prompt: str | None = None
    guidance_scale: float = setting(1.0, at_least=0)
    batch_input_path: str | None = None
    input_tokens_dir: str | None = None
    item: int | None = setting(None, at_least=0)
    max_clips: int | None = setting(None, at_least=1)
    num_input_frames: int | None = setting(None, at_least=1)
    num_samples: int = setting(1, at_least=1)
    sample: int | None = setting(None, at_least=0)
    num_rollout_chunks: int = setting(1, at_least=1)
    rollout_overlap: int | None = setting(None, at_least=1)
    rollout_anchor: bool = True
    batch_size: int = setting(1, at_least=1)
    video_save_name: str = "output"
    video_save_folder: str = "outputs/"
    save_tokens: bool = False
    save_log_probs: bool = False
    side_by_side: bool = False
    fps: float | None = setting(None, above=0, below=1000)
    temperature: float = setting(1.0, at_least=0)
    top_p: float | None = setting(0.8, above=0, at_most=1)
    top_k: int | None = setting(None, at_least=1)
    seed: int = setting(0, at_least=0, below=_SEED_LIMIT)
    num_gpus: int | None = setting(None, at_least=1)
    disable_diffusion_decoder: bool = False
    guardrail_dir: str | None = None
    disable_guardrail: bool = False
    overwrite: bool = False
    only_eval: bool = False
    offload_guardrail_models: bool = False
    offload_diffusion_decoder: bool = False
    offload_prompt_upsampler: bool = False

    @property
    def is_plain(self) -> bool:
        """Whether inputs are told to come without texts."""
        return self.input_type in PLAIN_INPUT_TYPES

    @property
    def takes_images(self) -> bool:
        """Whether one frame of each input is told to be given."""
        return self.input_type in IMAGE_INPUT_TYPES

    @property
    def samples(self) -> tuple[int, ...]:
        """Numbers of the samples of each input."""
        return tuple(range(self.num_samples)) if self.sample is None else (self.sample,)


SESSION_FLAGS = (
    Flag("--ar_model_dir"),
    Flag("--checkpoint_dir"),
    Flag("--encoder_path"),
    Flag("--decoder_path"),
    Flag("--text_encoder_path"),
    Flag("--text_encoder_dtype"),
    Flag("--tokenizer_compression_factor"),
    Flag("--width"),
    Flag("--height"),
    Flag("--num_context_frames"),
    Flag("--tensor_model_parallel_size"),
    Flag("--layer_spec"),
    Flag("--dtype"),
    Flag("--decoding"),
    Flag("--decoding_window"),
    Flag("--cuda_graphs"),
    Flag("--quantization"),
    Flag("--rope_scaling"),
    Flag("--rope_scale"),
    Flag("--allow_tokenizer_mismatch"),
    Flag("--offload_ar_model"),
    Flag("--offload_tokenizer"),
    Flag("--offload_text_encoder_model"),
)

FLAGS = (
    Flag("--input_type"),
    Flag("--input_image_or_video_path"),
    Flag("--prompt"),
    Flag("--negative_prompt"),
    Flag("--guidance_scale"),
    Flag("--batch_input_path", aliases=("--input_prompts_path",)),
    Flag("--input_tokens_dir"),
    Flag("--item"),
    Flag("--max_clips"),
    Flag("--num_input_frames"),
    Flag("--num_samples"),
    Flag("--sample"),
    Flag("--num_rollout_chunks"),
    Flag("--rollout_overlap"),
    Flag("--rollout_anchor"),
    Flag("--batch_size"),
    Flag("--video_save_name"),
    Flag("--video_save_folder"),
    Flag("--save_tokens"),
    Flag("--save_log_probs"),
    Flag("--side_by_side"),
    Flag("--fps"),
    Flag("--temperature"),
    Flag("--top_p"),
    Flag("--top_k"),
    Flag("--seed"),
    *SESSION_FLAGS,
    Flag("--num_gpus"),
    Flag("--disable_diffusion_decoder"),
    Flag("--guardrail_dir"),
    Flag("--disable_guardrail"),
    Flag("--overwrite"),
    Flag("--only_eval"),
    Flag("--offload_guardrail_models"),
    Flag("--offload_diffusion_decoder"),
    Flag("--offload_prompt_upsampler"),
)


def validate(config: InferConfig) -> None:
    """Lists every problem that no checkpoint could make right, at once; changes nothing.

    Raises:
        ConfigError: one sentence with all of them.
    """
    problems = [
        *_input_problems(config),
        *_sample_problems(config),
        *_process_problems(config),
        *_text_problems(config),
    ]
    check(config, flag_names(FLAGS), problems)


def _input_problems(config: InferConfig) -> list[str]:
    problems = []
    inputs = (config.input_image_or_video_path, config.batch_input_path, config.input_tokens_dir)
    if sum(given is not None for given in inputs) != 1:
        problems.append(
            "give one of --input_image_or_video_path (one input), --batch_input_path (a jsonl or a "
            "folder) and --input_tokens_dir (tokens)"
        )
    elif config.input_type is not None:
        takes_tokens = config.input_tokens_dir is not None
        if takes_tokens != (config.input_type == TOKENS):
            problems.append(
                f"--input_type {config.input_type} does not go with "
                f"{'--input_tokens_dir, which is of tokens' if takes_tokens else 'this input'}; "
                + ("leave it out" if takes_tokens else "give --input_tokens_dir")
            )
    if config.takes_images and config.num_input_frames not in (None, 1):
        problems.append(
            f"--num_input_frames {config.num_input_frames} does not fit --input_type "
            f"{config.input_type}, which gives 1 frame; leave it out"
        )
    if config.takes_images and config.side_by_side:
        problems.append("--side_by_side needs a truth to compare with, which an image has not")
    if config.max_clips is not None and config.input_tokens_dir is None:
        problems.append("--max_clips goes with --input_tokens_dir; leave it out")
    if config.only_eval:
        problems.append(
            "--only_eval scores tokens without making videos, which is done by evaluate.py onex; "
            "use that, or leave it out to make the videos"
        )
    return problems


def _sample_problems(config: InferConfig) -> list[str]:
    problems = []
    if config.num_samples > 1 and config.temperature == 0:
        problems.append(
            f"--num_samples {config.num_samples} at --temperature 0 would all be the same; give a "
            "temperature above 0"
        )
    if config.sample is not None and config.num_samples > 1:
        problems.append("--sample makes one sample and --num_samples several; give one of the two")
    if config.rollout_overlap is not None and config.num_rollout_chunks == 1:
        problems.append(
            f"--rollout_overlap {config.rollout_overlap} goes with --num_rollout_chunks above 1; "
            "leave it out"
        )
    return problems


def _process_problems(config: InferConfig) -> list[str]:
    asked, world = config.num_gpus, launch.world_size()
    if asked is None:
        return []
    if config.tensor_model_parallel_size not in (None, asked):
        return [
            f"--num_gpus {asked} and --tensor_model_parallel_size "
            f"{config.tensor_model_parallel_size} both say how many processes share the model; "
            "leave one of them out"
        ]
    if asked != world:
        return [
            f"--num_gpus {asked} needs {asked} processes, but {world} "
            f"{'was' if world == 1 else 'were'} started; start with torchrun "
            f"--nproc-per-node={asked}, or leave it out"
        ]
    return []


def _text_problems(config: InferConfig) -> list[str]:
    problems = []
    for name, text in (("prompt", config.prompt), ("negative_prompt", config.negative_prompt)):
        if text is not None and (problem := prompt_problem(text)):
            problems.append(f"--{name} {problem}")
    texts = (config.prompt, config.negative_prompt)
    if config.is_plain and (texts != (None, None) or config.guidance_scale != 1):
        problems.append(
            f"--prompt, --negative_prompt and --guidance_scale do not go with --input_type "
            f"{config.input_type}; use text_and_{config.input_type}, or leave them out"
        )
    batch = config.batch_input_path
    if config.prompt is not None and batch is not None and not Path(batch).is_dir():
        problems.append(
            "--prompt goes with one input or a folder; in a batch, write a prompt into each line "
            "of the jsonl"
        )
    is_single = config.input_image_or_video_path is not None
    if is_single and config.input_type in TEXT_INPUT_TYPES and config.prompt is None:
        problems.append(f"--input_type {config.input_type} needs --prompt; say what is to be seen")
    if config.negative_prompt is not None and config.guidance_scale == 1:
        problems.append(
            "--negative_prompt has no effect at --guidance_scale 1; leave it out, or give a scale "
            "above 1"
        )
    return problems
