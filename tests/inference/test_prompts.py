"""Prompts: the numbers of the training data, what is encoded and freed when, what is refused."""

from __future__ import annotations

import dataclasses
import json
import sys
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import infer_case
from helpers.distributed_run import run_script
from helpers.infer_case import FRAMES, HEIGHT, LATENT_SHAPE, TOKENIZER, WIDTH, random_config
from helpers.prompts import prepare_prompts, write_lines
from helpers.t5 import write_t5

from cosmos_posttrain import generate
from cosmos_posttrain.data.contract import TextEncoderInfo
from cosmos_posttrain.data.dataset import TokenDataset
from cosmos_posttrain.errors import ConfigError, GeometryError, OutputFolderError, TextError
from cosmos_posttrain.inference.batch import open_run, run
from cosmos_posttrain.inference.conditioning import TextConditioner, TextEncoderChoice
from cosmos_posttrain.inference.config import InferConfig
from cosmos_posttrain.inference.request import Request
from cosmos_posttrain.inference.session import Session
from cosmos_posttrain.text import TextEncoder, load_text_encoder

MODEL = "random:tiny-video2world"
PROMPTS = ("the red ball moves left", "a blue box falls")


@pytest.fixture
def video(tmp_path: Path) -> Path:
    return infer_case.write_input(tmp_path / "bar.mp4")


def config(video: Path, folder: Path, **changes: Any) -> InferConfig:
    values = {"ar_model_dir": MODEL, "text_encoder_path": "tiny", "prompt": PROMPTS[0]}
    return random_config(video, folder / "out", **(values | changes))


def batch_config(folder: Path, rows: list[dict[str, str]], **changes: Any) -> InferConfig:
    path = folder / "batch.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    values = {"input_image_or_video_path": None, "prompt": None, "batch_input_path": str(path)}
    return config(folder, folder, **(values | changes))


def trained_config(video: Path, folder: Path, text: TextEncoderInfo, **changes: Any) -> InferConfig:
    """Of a checkpoint that records its text encoder; it has no weights of its own."""
    with_text = {"kind": "video2world", "text_encoder": text, "context_len": 32}
    path = infer_case.write_checkpoint(folder / "trained", "tiny-video2world", **with_text)
    values = {"ar_model_dir": str(path), "encoder_path": None, "text_encoder_path": None}
    return config(video, folder, **(values | changes))


def spied(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Prompts in the order in which they are encoded from now on."""
    encoded: list[str] = []
    encode = TextEncoder.encode_tokens

    def spy(self, tokens, batch_size=8):
        encoded.extend(item.prompt for item in tokens)
        return encode(self, tokens, batch_size)

    monkeypatch.setattr(TextEncoder, "encode_tokens", spy)
    return encoded


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_a_prompt_gives_the_numbers_that_training_read(tmp_path: Path, dtype: str) -> None:
    (tmp_path / "videos").mkdir()
    lines = write_lines(tmp_path / "videos")
    manifest = prepare_prompts(lines, tmp_path / "tokens", embedding_dtype=dtype)
    text, context_len = manifest.contract.text_encoder, manifest.contract.context_len
    assert text is not None and context_len is not None
    choice = TextEncoderChoice("tiny", True, text, None, text.dtype, context_len, text.width)
    conditioner = TextConditioner(choice, frees=False)
    data = TokenDataset(tmp_path / "tokens", "all")
    for number in range(len(data)):
        prompt, stored = data.row(number).prompt, data.context(number)
        assert prompt is not None and stored is not None
        context = conditioner.context(prompt)
        assert context.dtype == stored.dtype
        # Prompts were stored in batches, which may round the last bit of float32 otherwise.
        tolerance = 0.0 if dtype == "bfloat16" else 1e-6
        torch.testing.assert_close(context[0], stored, rtol=0, atol=tolerance)
    null = conditioner.context(None)
    assert null.shape == (1, context_len, text.width) and not null.any()


def test_a_session_feeds_what_generate_is_fed(video: Path, tmp_path: Path) -> None:
    session = Session(config(video, tmp_path))
    session.load()
    assert session._model is not None
    with torch.no_grad():  # fresh texts are too quiet to be heard
        for layer in session._model.module.decoder.layers:
            layer.cross_attention.linear_proj.weight *= 200
    tokens = torch.arange(12).view(2, *LATENT_SHAPE[1:])
    encoder = load_text_encoder("tiny", "cpu")
    texts = [encoder.embed([prompt]) for prompt in PROMPTS]
    bov = torch.tensor([[session.model_config.bov_token]])
    prompt = torch.cat([bov, tokens.flatten()[None]], 1)
    settings: dict[str, Any] = {"top_p": 0.9, "seed": 5}
    expected = [
        generate(session._model, prompt, 6, context=texts[0], **settings),
        generate(session._model, prompt, 6, context=texts[0], guidance_scale=4.0, **settings),
        generate(
            session._model,
            prompt,
            6,
            context=texts[0],
            guidance_scale=4.0,
            negative_context=texts[1],
            **settings,
        ),
    ]
    guided = Request(tokens=tokens, prompt=PROMPTS[0], guidance_scale=4.0, **settings)
    requests = [
        dataclasses.replace(guided, guidance_scale=1.0),
        guided,
        dataclasses.replace(guided, negative_prompt=PROMPTS[1]),
    ]
    results = [session.generate(request) for request in requests]
    for result, tokens_of in zip(results, expected, strict=True):
        assert torch.equal(result.tokens.flatten()[12:], tokens_of[0])
        assert result.text_encoder == {"id": "tiny", "sha256": encoder.sha256}
        assert (result.num_condition_tokens, result.num_generated_tokens) == (12, 6)
    assert len({json.dumps(result.settings) for result in results}) == 3
    assert len({tuple(result.tokens.flatten().tolist()) for result in results}) > 1
    # Rows that somebody else made are the same as the prompt's own.
    given = session.generate(
        dataclasses.replace(requests[1], prompt=None, context=encoder.encode(PROMPTS[:1])[0])
    )
    assert torch.equal(given.tokens, results[1].tokens)
    assert given.text_encoder is None and "context with sha256" in given.settings["context"]


def test_given_contexts_need_no_text_encoder(video: Path, tmp_path: Path) -> None:
    session = Session(config(video, tmp_path, text_encoder_path="nowhere"))
    for rows in (0, 5):
        request = Request(path=video, context=torch.ones(rows, 64), guidance_scale=2.0)
        assert session.generate(request).tokens.shape == tuple(LATENT_SHAPE)
    with pytest.raises(TextError, match="nowhere does not exist"):
        session.generate(Request(path=video, prompt="a ball"))


@pytest.mark.parametrize("offload", [False, True])
def test_the_text_encoder_is_gone_before_tokens_are_generated(
    video: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, offload: bool
) -> None:
    encoded = spied(monkeypatch)
    networks: list[weakref.ref[Any]] = []
    make = TextEncoder.__init__

    def noting(self: TextEncoder, model: Any, *args: Any) -> None:
        networks.append(weakref.ref(model.encoder.block[0]))
        make(self, model, *args)

    monkeypatch.setattr(TextEncoder, "__init__", noting)
    session = Session(config(video, tmp_path, offload_text_encoder_model=offload))
    assert not networks
    session.encode_prompts([*PROMPTS, PROMPTS[0]])
    assert encoded == list(PROMPTS) and len(networks) == 1
    session.load()
    during: list[bool] = []

    for prompt in PROMPTS:
        request = Request(path=video, prompt=prompt)
        session.generate(request, lambda _: during.append(networks[0]() is not None))
    assert set(during) == {not offload}
    assert encoded == list(PROMPTS)
    # Another prompt later, as a service has it.
    session.generate(Request(path=video, prompt="another", negative_prompt="b", guidance_scale=2.0))
    assert encoded == [*PROMPTS, "another", "b"]
    assert len(networks) == (2 if offload else 1)


def test_one_input_with_two_prompts_is_two_clips_and_another_prompt_is_another(
    video: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    encoded = spied(monkeypatch)
    infer_case.write_input(tmp_path / "foo.mp4")
    rows = [
        {"visual_input": "bar.mp4", "prompt": PROMPTS[0]},
        {"visual_input": "bar.mp4", "prompt": PROMPTS[1]},
        {"visual_input": "foo.mp4", "prompt": "word " * 10_000},
    ]
    settings: dict[str, Any] = {"guidance_scale": 2.0, "input_type": "text_and_video"}
    run(batch_config(tmp_path, rows, **settings))
    said = capsys.readouterr().err
    assert said.count("encoder takes 32; it is cut from character 78 on") == 1
    out = tmp_path / "out"
    assert sorted(path.stem for path in out.glob("*.mp4")) == ["bar", "bar_2", "foo"]
    record = json.loads((out / "bar_2.json").read_text())
    assert record["settings"]["prompt"] == PROMPTS[1]
    assert record["settings"]["guidance_scale"] == 2.0
    assert record["text_encoder"]["sha256"] == load_text_encoder("tiny", "cpu").sha256
    assert len(encoded) == 3
    # What is complete is neither encoded nor made again.
    (out / "bar_2.mp4").unlink()
    run(batch_config(tmp_path, rows, **settings))
    assert encoded[3:] == [PROMPTS[1]]
    rows[0]["prompt"] = "something else"
    with pytest.raises(OutputFolderError, match=r"bar\.mp4 exists and was not made with these"):
        run(batch_config(tmp_path, rows, **settings))


def test_lines_without_a_prompt_are_named(video: Path, tmp_path: Path) -> None:
    infer_case.write_input(tmp_path / "foo.mp4")
    rows = [{"visual_input": "bar.mp4", "prompt": "a"}, {"visual_input": "foo.mp4"}]
    with pytest.raises(ConfigError, match=r"batch\.jsonl, line 2: .*Video2World.*needs a text"):
        open_run(batch_config(tmp_path, rows))
    base = {"ar_model_dir": "random:tiny", "text_encoder_path": None}
    with pytest.raises(ConfigError, match=r"batch\.jsonl, line 1: .*takes no text"):
        open_run(batch_config(tmp_path, rows, **base))
    # Told to leave the texts out.
    _, items = open_run(batch_config(tmp_path, rows, input_type="video", **base))
    assert [item.request.prompt for item in items] == [None, None]
    with pytest.raises(ConfigError, match="--prompt goes with one input"):
        open_run(batch_config(tmp_path, rows, prompt="a"))
    twice = [rows[0], rows[0]]
    with pytest.raises(ConfigError, match=r"bar\.mp4 is named twice in the batch"):
        open_run(batch_config(tmp_path, twice))


def test_the_input_says_whether_it_is_an_image(video: Path, tmp_path: Path) -> None:
    (tmp_path / "picture.png").write_bytes(b"\x89PNG")
    rows = [{"visual_input": name, "prompt": "a"} for name in ("bar.mp4", "picture.png")]
    session, items = open_run(batch_config(tmp_path, rows))
    assert [item.request.num_given(session.geometry) for item in items] == [9, 1]
    _, items = open_run(batch_config(tmp_path, rows, input_type="text_and_image"))
    assert [item.request.num_input_frames for item in items] == [1, 1]
    with pytest.raises(ConfigError, match="is an image; give --input_type text_and_image"):
        open_run(batch_config(tmp_path, rows, input_type="text_and_video"))


def check_refused(session: Session, request: Request, message: str) -> None:
    with pytest.raises(TextError, match=message) as caught:
        session.generate(request)
    assert "\n" not in str(caught.value) and caught.value.exit_code == 2


def test_the_checkpoint_knows_its_text_encoder(video: Path, tmp_path: Path) -> None:
    tiny = load_text_encoder("tiny", "cpu")
    text = TextEncoderInfo("tiny", tiny.sha256, tiny.width, "bfloat16")
    request = Request(path=video, prompt="a ball")
    known = Session(trained_config(video, tmp_path / "a", text))
    assert known.settings_of(request)["text_encoder"] == {
        "id": "tiny",
        "sha256": tiny.sha256,
        "dtype": None,
        "stored_dtype": "bfloat16",
    }
    known.encode_prompts(["a ball"])  # is the one
    other = dataclasses.replace(text, sha256="0" * 64)
    message = "trained on texts of tiny .sha256 000000000000.*other weights.*--allow_tokenizer_mis"
    check_refused(Session(trained_config(video, tmp_path / "b", other)), request, message)
    changes = {"allow_tokenizer_mismatch": True}
    Session(trained_config(video, tmp_path / "c", other, **changes)).encode_prompts(["a ball"])
    gone = dataclasses.replace(text, id=str(tmp_path / "gone"))
    message = "trained on texts of .*gone, which is not here; .*--text_encoder_path"
    check_refused(Session(trained_config(video, tmp_path / "d", gone)), request, message)


def test_text_encoders_that_cannot_be_used_are_refused(video: Path, tmp_path: Path) -> None:
    request = Request(path=video, prompt="a ball")
    small, empty = write_t5(tmp_path / "t5"), write_t5(tmp_path / "empty")
    (empty / "model.safetensors").unlink()
    for path, message in (
        (None, "does not say which text encoder makes them; name it with --text_encoder_path"),
        (str(small), "takes a text of 32 rows of 64 numbers, but .* makes 20 of 32"),
        (str(empty), "holds no encoder weights"),
    ):
        check_refused(Session(config(video, tmp_path, text_encoder_path=path)), request, message)
    # A run says so before it loads a model, and leaves nothing behind.
    with pytest.raises(TextError, match="holds no encoder weights"):
        run(config(video, tmp_path, text_encoder_path=str(empty)))
    assert not (tmp_path / "out").exists()


def test_bad_texts_of_requests_are_refused(video: Path, tmp_path: Path) -> None:
    with pytest.raises(TextError, match="prompt is empty"):
        Request(path=video, prompt=" ")
    with pytest.raises(TextError, match="negative_prompt is empty"):
        Request(path=video, prompt="a", negative_prompt="", guidance_scale=2.0)
    with pytest.raises(ConfigError, match="no effect at guidance_scale 1"):
        Request(path=video, prompt="a", negative_prompt="b")
    with pytest.raises(ConfigError, match=r"guidance_scale -1\.0 must be"):
        Request(path=video, prompt="a", guidance_scale=-1.0)
    with pytest.raises(ConfigError, match="give prompt or context"):
        Request(path=video, prompt="a", context=torch.zeros(1, 64))
    session = Session(config(video, tmp_path))
    with pytest.raises(ConfigError, match="tiny-video2world is a Video2World model"):
        session.generate(Request(path=video))
    for context in (torch.zeros(1, 3), torch.zeros(33, 64), torch.zeros(1, 64).long()):
        with pytest.raises(GeometryError, match=r"takes \(L, 64\) floats, L at most 32"):
            session.generate(Request(path=video, context=context))


def test_without_the_extra_it_says_what_to_install(
    video: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)  # what an import of it then raises
    with pytest.raises(TextError, match=r"package transformers, which is not installed; run pip"):
        run(config(video, tmp_path))
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
@pytest.mark.distributed
def test_two_processes_generate_what_one_does(video: Path, tmp_path: Path) -> None:
    settings = ["--ar_model_dir", MODEL, "--text_encoder_path", "tiny", "--prompt", PROMPTS[0]]
    settings += ["--guidance_scale", "3", "--negative_prompt", PROMPTS[1]]
    settings += ["--input_type", "text_and_video", "--input_image_or_video_path", str(video)]
    settings += ["--encoder_path", TOKENIZER, "--disable_diffusion_decoder"]
    settings += ["--width", str(WIDTH), "--height", str(HEIGHT)]
    settings += ["--num_context_frames", str(FRAMES), "--offload_text_encoder_model"]
    two = tmp_path / "two" / "clip.mp4"
    finished = run_script(["infer.py", *settings, "--video_save_name", str(two)], nproc=2)
    assert finished.returncode == 0, finished.stderr
    changes = {"guidance_scale": 3.0, "negative_prompt": PROMPTS[1]}
    run(config(video, tmp_path, **changes))
    records = [
        json.loads(path.read_text())
        for path in (two.with_suffix(".json"), tmp_path / "out" / "output.json")
    ]
    assert [record["tensor_model_parallel_size"] for record in records] == [2, 1]
    assert records[0]["settings"] == records[1]["settings"]
    assert records[0]["text_encoder"] == records[1]["text_encoder"]
    assert records[0]["tokens_sha256"] == records[1]["tokens_sha256"]
