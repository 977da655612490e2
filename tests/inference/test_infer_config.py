"""The settings of ``infer.py``: every one has a flag and a help text, and its rule always binds."""

from __future__ import annotations

import dataclasses
import shlex
import time
from pathlib import Path

import pytest
from helpers.distributed_run import run_script

from cosmos_posttrain.cli import parse
from cosmos_posttrain.config import documentation
from cosmos_posttrain.errors import ConfigError
from cosmos_posttrain.inference.config import FLAGS, InferConfig, SessionConfig, validate


def test_every_setting_has_a_flag_and_a_help_text() -> None:
    names = {field.name for field in dataclasses.fields(InferConfig)}
    assert {flag.target for flag in FLAGS} == names
    assert documentation(InferConfig).keys() == names
    assert documentation(SessionConfig).keys() < names
    start = time.monotonic()
    finished = run_script(["infer.py", "--help"])
    # Without torch it takes 0.4 s; torch and megatron take 3 s and more.
    assert time.monotonic() - start < 2.0
    assert finished.returncode == 0
    assert "--input_prompts_path" in finished.stdout
    assert "processes that share the model" in finished.stdout


def test_rules_bind_values_of_a_file_and_of_overrides_and_all_are_named(tmp_path: Path) -> None:
    path = tmp_path / "infer.yaml"
    path.write_text("input_image_or_video_path: a.mp4\ntop_p: 1.5\nseed: 3\ntemperature: 0\n")
    config = parse(InferConfig, FLAGS, ["--config", str(path), "top_p=0.5"], "infer.py", "")
    validate(config)
    assert (config.top_p, config.seed, config.temperature) == (0.5, 3, 0.0)
    arguments = ["--config", str(path), "--width", "0", "layer_spec=x", "dtype=bf16"]
    config = parse(InferConfig, FLAGS, arguments, "infer.py", "")
    with pytest.raises(ConfigError) as caught:
        validate(config)
    for words in (
        "--top_p 1.5 must be at most 1",
        "--width 0 must be at least 1",
        "--layer_spec x is not one of torch, te",
        "--dtype bf16 is not one of",
    ):
        assert words in str(caught.value)


PROMPT = "A video recorded from a moving vehicle's perspective, capturing roads and buildings."
ORIGINAL_COMMANDS: dict[str, tuple[str, dict[str, object]]] = {
    "after post-training": (
        "--input_image_or_video_path 0.mp4 --prompt PROMPT --width 512 --height 320 "
        "--num_context_frames 17 --video_save_name evals/0.mp4 "
        "--tokenizer_compression_factor 4,8,8 --encoder_path nvidia/E --decoder_path nvidia/D "
        "--ar_model_dir M --disable_diffusion_decoder",
        {"prompt": PROMPT, "input_type": None, "num_context_frames": 17},
    ),
    "single": (
        "--input_type=text_and_video --input_image_or_video_path=a/input.mp4 --prompt=PROMPT "
        "--video_save_name=Cosmos-1.0-Autoregressive-5B-Video2World "
        "--ar_model_dir=Cosmos-1.0-Autoregressive-5B-Video2World --top_p=0.7 --temperature=1.0",
        {"prompt": PROMPT, "input_type": "text_and_video", "top_p": 0.7, "guidance_scale": 1.0},
    ),
    "little memory": (
        "--input_type=text_and_video --input_image_or_video_path=a/input.mp4 --prompt=PROMPT "
        "--video_save_name=Cosmos-1.0-Autoregressive-13B-Video2World "
        "--ar_model_dir=Cosmos-1.0-Autoregressive-13B-Video2World --top_p=0.8 --temperature=1.0 "
        "--offload_guardrail_models --offload_diffusion_decoder --offload_ar_model "
        "--offload_tokenizer --offload_text_encoder_model",
        {
            "offload_ar_model": True,
            "offload_tokenizer": True,
            "offload_text_encoder_model": True,
            "offload_guardrail_models": True,
        },
    ),
    "batch": (
        "--input_type=text_and_video --batch_input_path=a/video2world.jsonl "
        "--video_save_folder=outputs/Cosmos-1.0-Autoregressive-13B-Video2World "
        "--ar_model_dir=Cosmos-1.0-Autoregressive-13B-Video2World --top_p=0.8 --temperature=1.0 "
        "--offload_guardrail_models",
        {"batch_input_path": "a/video2world.jsonl", "prompt": None},
    ),
    "image, by other names": (
        "--input_type=text_and_image --input_prompts_path a.jsonl --seed 0 --num_input_frames 1 "
        "--checkpoint_dir checkpoints --offload_prompt_upsampler",
        {"batch_input_path": "a.jsonl", "takes_images": True, "num_input_frames": 1},
    ),
}


@pytest.mark.parametrize("name", ORIGINAL_COMMANDS)
def test_the_original_recipes_commands_for_video2world_are_taken(name: str) -> None:
    command, expected = ORIGINAL_COMMANDS[name]
    arguments = shlex.split(command.replace("PROMPT", shlex.quote(PROMPT)))
    config = parse(InferConfig, FLAGS, arguments, "infer.py", "")
    validate(config)
    assert {key: getattr(config, key) for key in expected} == expected
