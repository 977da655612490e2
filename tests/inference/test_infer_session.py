"""What a run refuses before weights are loaded, and what a session takes from the checkpoint."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
from helpers import infer_case
from helpers.infer_case import FRAMES, HEIGHT, LATENT_SHAPE, TOKENIZER, WIDTH, random_config

from cosmos_posttrain.data.contract import TextEncoderInfo
from cosmos_posttrain.errors import UserError
from cosmos_posttrain.inference.batch import open_run
from cosmos_posttrain.inference.config import InferConfig
from cosmos_posttrain.inference.inputs import make_items
from cosmos_posttrain.inference.request import Request
from cosmos_posttrain.inference.session import Session
from cosmos_posttrain.models.presets import preset
from cosmos_posttrain.models.reference_config import to_reference


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A video, an image's stand-in, checkpoints and a damaged file."""
    folder = tmp_path_factory.mktemp("inputs")
    infer_case.write_input(folder / "bar.mp4")
    (folder / "empty.mp4").touch()
    (folder / "picture.png").write_bytes(b"\x89PNG\r\n\x1a\n" + b"\0" * 64)
    infer_case.write_checkpoint(folder / "trained")
    text = TextEncoderInfo("tiny", "1" * 64, 64, "bfloat16")
    with_text = {"kind": "video2world", "text_encoder": text, "context_len": 32}
    infer_case.write_checkpoint(folder / "with_text", "tiny-video2world", **with_text)
    infer_case.write_checkpoint(folder / "damaged", latent_shape=(3, 2))
    other = dataclasses.replace(infer_case.contract().tokenizer, sha256="0" * 64)
    infer_case.write_checkpoint(folder / "other_weights", tokenizer=other)
    return folder


def trained_config(inputs: Path, output: Path, **changes: Any) -> InferConfig:
    values = {
        "input_image_or_video_path": str(inputs / "bar.mp4"),
        "ar_model_dir": str(inputs / "trained"),
        "video_save_folder": str(output),
        "disable_diffusion_decoder": True,
    }
    return InferConfig(**(values | changes))


def test_a_checkpoint_says_tokenizer_and_geometry(inputs: Path, tmp_path: Path) -> None:
    session, items = open_run(trained_config(inputs, tmp_path / "out"))
    geometry = session.geometry
    assert (geometry.num_frames, geometry.height, geometry.width) == (FRAMES, HEIGHT, WIDTH)
    assert session.tokenizer_info.id == TOKENIZER
    assert session.contract is not None and session.contract.tokenizer == session.tokenizer_info
    assert session.model_config.latent_shape == LATENT_SHAPE
    assert items[0].request.num_given(geometry) == 9
    assert session.tensor_model_parallel_size == 1
    assert session.notes == ()
    assert [item.video for item in items] == [tmp_path / "out" / "output.mp4"]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"width": 64}, "trained on clips of 17 frames of 48x32, but 17 frames of 64x32"),
        ({"num_context_frames": 25}, "but 25 frames of 48x32 were asked for"),
        ({"tokenizer_compression_factor": "4,8,8"}, "8x16x16.*but 4x8x8 was asked for"),
        ({"encoder_path": "tiny-dv4x8x8"}, "compresses by 4x8x8, but 8x16x16"),
        ({"ar_model_dir": "other_weights"}, "has other weights"),
        ({"ar_model_dir": "with_text"}, "with_text is a Video2World model, which needs a text"),
        (
            {"ar_model_dir": "with_text", "input_type": "video"},
            "is for base models and .*with_text",
        ),
        ({"prompt": "a ball"}, "trained is a base model, which takes no text"),
        ({"guidance_scale": 2.0}, "trained is a base model, which takes no text"),
        ({"prompt": "a ball", "input_type": "text_and_video"}, "for Video2World models.*trained"),
        ({"prompt": "a ball", "input_type": "video"}, "do not go with --input_type video"),
        ({"prompt": " "}, "--prompt is empty"),
        ({"prompt": "a", "negative_prompt": "", "guidance_scale": 2.0}, "--negative_prompt is emp"),
        ({"prompt": "a", "negative_prompt": "b"}, "no effect at --guidance_scale 1"),
        ({"guidance_scale": -0.5}, "--guidance_scale -0.5 must be at least 0"),
        ({"ar_model_dir": "damaged"}, "damaged or foreign: its latent_shape is"),
        ({"tensor_model_parallel_size": 3}, "does not divide num_attention_heads 8"),
        ({"tensor_model_parallel_size": 2}, "torchrun --nproc-per-node=2"),
        ({"num_input_frames": 8}, "8 input frames cannot be encoded.*use 1 or 9"),
        ({"num_input_frames": 17}, "leave nothing to generate"),
        ({"input_type": "text_and_video"}, "--input_type text_and_video needs --prompt"),
        ({"input_type": "audio"}, "--input_type audio is not one of video, image, text_and_video"),
        ({"input_type": "image", "num_input_frames": 9}, "gives 1 frame"),
        ({"input_image_or_video_path": None}, "give one of --input_image"),
        ({"input_image_or_video_path": "missing.mp4"}, "missing.mp4 does not exist"),
        ({"input_image_or_video_path": "empty.mp4"}, "is empty"),
        ({"input_image_or_video_path": "picture.png"}, "picture.png"),
        ({"ar_model_dir": "nowhere"}, "nowhere does not exist"),
        ({"ar_model_dir": "."}, "holds no model"),
        ({"video_save_name": ""}, "is not a file name"),
        ({"video_save_name": "bar.mp4/clip"}, "is a file"),
        ({"temperature": -1.0}, "--temperature -1.0 must be at least 0"),
        ({"temperature": float("nan")}, "--temperature nan must be a finite number"),
        ({"top_p": 80.0}, "--top_p 80.0 must be at most 1"),
        ({"top_k": 0}, "--top_k 0 must be at least 1"),
        ({"seed": -1}, "--seed -1 must be at least 0"),
        ({"fps": 0.0}, "--fps 0.0 must be above 0"),
        ({"num_input_frames": 0}, "--num_input_frames 0 must be at least 1"),
        ({"rope_scale": 0.5}, "--rope_scale 0.5 must be at least 1"),
        ({"dtype": "bf16"}, "--dtype bf16 is not one of bfloat16"),
        ({"layer_spec": "x"}, "--layer_spec x is not one of torch, te"),
        ({"seed": -1, "top_p": 2.0, "input_type": "audio"}, "audio is not.*--top_p 2.*--seed -1"),
        ({"tokenizer_compression_factor": "4,8"}, "three positive whole numbers"),
    ],
)
def test_bad_usage_is_one_sentence_and_nothing_is_written(
    inputs: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    changes: dict[str, Any],
    message: str,
) -> None:
    monkeypatch.chdir(inputs)
    before = sorted(inputs.rglob("*"))
    with pytest.raises(UserError, match=message) as caught:
        open_run(trained_config(inputs, tmp_path / "out", **changes))
    assert caught.value.exit_code == 2
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []
    assert sorted(inputs.rglob("*")) == before


@pytest.mark.parametrize(
    "changes",
    [
        {"width": 64, "num_context_frames": 25},
        {"encoder_path": "tiny-dv4x8x8", "tokenizer_compression_factor": "4,8,8"},
        {"encoder_path": "tiny-dv4x8x8"},
        {"ar_model_dir": "other_weights"},
    ],
)
def test_a_mismatch_can_be_tried_anyway(
    inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any]
) -> None:
    monkeypatch.chdir(inputs)
    config = trained_config(inputs, tmp_path, allow_tokenizer_mismatch=True, **changes)
    session, _ = open_run(config)
    assert session.model_config.latent_shape == session.geometry.latent_shape


def write_published(folder: Path, **changes: Any) -> Path:
    """A ``model.pt`` folder: no record of the data it was trained on."""
    folder.mkdir(parents=True)
    (folder / "model.pt").touch()
    model = dataclasses.replace(preset("tiny", 1000, LATENT_SHAPE), **changes)
    (folder / "config.json").write_text(json.dumps(to_reference(model)))
    return folder


def test_a_model_pt_runs_at_its_own_grid_or_says_that_it_does_not(
    inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_published(tmp_path / "checkpoints" / "Cosmos-tiny")
    monkeypatch.chdir(tmp_path)
    config = trained_config(
        inputs, tmp_path / "out", ar_model_dir="Cosmos-tiny", encoder_path=TOKENIZER
    )
    session = Session(config)
    assert session.geometry.latent_shape == LATENT_SHAPE
    assert session.notes == ()
    wider = Session(dataclasses.replace(config, width=64))
    assert wider.model_config.latent_shape == (3, 2, 4)
    assert [note.split(",")[0] for note in wider.notes] == ["the model's own grid is (3"]


def test_rope_scaling_reaches_the_model_and_the_settings(inputs: Path, tmp_path: Path) -> None:
    config = trained_config(inputs, tmp_path, width=96, allow_tokenizer_mismatch=True)
    plain = Session(config)
    scaled = Session(dataclasses.replace(config, rope_scaling="interpolate"))
    given = Session(dataclasses.replace(config, rope_scaling="yarn", rope_scale=3.0))
    assert plain.model_config.position_scale == (1.0, 1.0, 1.0)
    assert scaled.model_config.position_scale == (1.0, 1.0, 0.5)
    assert given.model_config.yarn is not None and given.model_config.yarn.scale == 3.0
    # A clip made with another scaling is another clip.
    request = Request(path=inputs / "bar.mp4")
    settings = [session.settings_of(request) for session in (plain, scaled, given)]
    assert settings[0] != settings[1] != settings[2]


def test_another_vocabulary_is_refused_whatever_the_flags(inputs: Path, tmp_path: Path) -> None:
    model = write_published(tmp_path / "model", vocab_size=512)
    config = trained_config(
        inputs,
        tmp_path,
        ar_model_dir=str(model),
        encoder_path=TOKENIZER,
        allow_tokenizer_mismatch=True,
    )
    with pytest.raises(UserError, match="has 1000 tokens and the model 512"):
        Session(config)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("clip", "out/clip.mp4"),
        ("Cosmos-1.0-Autoregressive-4B", "out/Cosmos-1.0-Autoregressive-4B.mp4"),
        ("clip.mp4", "out/clip.mp4"),
        ("evals/clip", "evals/clip.mp4"),
    ],
)
def test_bare_names_lie_in_the_output_folder(
    inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, expected: str
) -> None:
    monkeypatch.chdir(tmp_path)
    config = random_config(inputs / "bar.mp4", Path("out"), video_save_name=name)
    assert make_items(config, None)[0].video == Path(expected)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "names no input"),
        ("{", "line 1, is not JSON"),
        ('{"prompt": "x"}', "line 1, has no visual_input"),
        ('\n{"visual_input": "missing.mp4"}', "line 2: .*missing.mp4 is not a file"),
        ('{"visual_input": "bar.mp4"}\n{"visual_input": "./bar.mp4"}', "bar.mp4 is named twice"),
        ('{"visual_input": "picture.png"}', "is an image; give --input_type image"),
        ('{"visual_input": "bar.mp4", "prompt": ""}', "line 1: its prompt is empty"),
        ('{"visual_input": "bar.mp4", "prompt": 3}', "line 1: its prompt is a int"),
    ],
)
def test_bad_batches_are_refused(inputs: Path, tmp_path: Path, text: str, message: str) -> None:
    path = inputs / "batch.jsonl"
    path.write_text(text)
    config = random_config(
        inputs,
        tmp_path,
        input_image_or_video_path=None,
        batch_input_path=str(path),
        input_type="video" if "picture" in text else None,
    )
    with pytest.raises(UserError, match=message):
        make_items(config, None)
