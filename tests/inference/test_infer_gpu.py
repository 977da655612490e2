"""Generation on a GPU: the CPU's tokens, the cache in bfloat16, a clip, memory that is freed."""

from __future__ import annotations

import gc
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import infer_case
from helpers.distributed_run import run_script
from helpers.infer_case import LATENT_SHAPE, TOKENIZER, random_config
from safetensors.torch import load_file

from cosmos_posttrain import generate, load_model, load_tokenizer
from cosmos_posttrain.doctor import AR_CASE, full_float32
from cosmos_posttrain.inference.batch import run
from cosmos_posttrain.inference.config import InferConfig
from cosmos_posttrain.inference.decode_state import DecodeState
from cosmos_posttrain.models.ar_model import ARModel
from cosmos_posttrain.tokenizer.video_tokenizer import VideoTokenizer
from cosmos_posttrain.video import probe

pytestmark = pytest.mark.gpu

NUM_GIVEN = 12


def prompt() -> torch.Tensor:
    tokens = load_file(AR_CASE / "io.safetensors")["tokens"]
    return tokens[:1, :NUM_GIVEN].long()


def rest(model: ARModel) -> int:
    return model.config.seq_length - NUM_GIVEN


ON_THE_CPU = """
import json, sys
from safetensors.torch import load_file
from cosmos_posttrain import generate, load_model
folder, given = sys.argv[1], int(sys.argv[2])
model = load_model(folder, dtype="float32")
tokens = load_file(folder + "/io.safetensors")["tokens"][:1, :given].long()
number = model.config.seq_length - given
print(json.dumps(generate(model, tokens, number, top_p=0.9, seed=7)[0].tolist()))
"""


def test_float32_draws_the_tokens_of_the_cpu() -> None:
    env = {"CUDA_VISIBLE_DEVICES": ""}
    finished = run_script(["-c", ON_THE_CPU, str(AR_CASE), str(NUM_GIVEN)], env=env)
    assert finished.returncode == 0, finished.stderr
    model = load_model(AR_CASE, dtype="float32")
    assert model.device == torch.device("cuda", 0)
    with full_float32():
        found = generate(model, prompt(), rest(model), top_p=0.9, seed=7)
    assert found.device == model.device
    assert found[0].tolist() == json.loads(finished.stdout.splitlines()[-1])


def test_the_cache_in_bfloat16() -> None:
    """What was drawn through the cache is what the model finds likeliest without one."""
    model = load_model(AR_CASE, dtype="bfloat16")
    found = generate(model, prompt(), rest(model), temperature=0.0)
    again = generate(model, prompt(), rest(model), temperature=0.0)
    assert torch.equal(found, again)
    clip = torch.cat([prompt().to(found), found], dim=1)
    logits = model.logits(clip)[:, NUM_GIVEN - 1 : -1]
    drawn = logits.gather(2, found[..., None])[..., 0]
    # Logits of standard deviation 0.6 that are rounded to bfloat16 in every layer, in two ways.
    assert (logits.amax(dim=2) - drawn).max() < 0.15


def test_sampling_depends_on_the_seed_alone() -> None:
    model = load_model(AR_CASE, dtype="bfloat16")
    first, same, other = (
        generate(model, prompt(), rest(model), top_p=0.9, seed=seed) for seed in (1, 1, 2)
    )
    assert torch.equal(first, same) and not torch.equal(first, other)
    assert int(first.min()) >= 0 and int(first.max()) < model.config.vocab_size


def test_a_video_becomes_a_clip(tmp_path: Path) -> None:
    video = infer_case.write_input(tmp_path / "bar.mp4")
    run(random_config(video, tmp_path / "out"))
    assert probe(tmp_path / "out" / "output.mp4").num_frames == infer_case.FRAMES


def allocated(config: InferConfig) -> dict[str, int]:
    """Bytes that are allocated when frames are encoded, tokens drawn, and the clip decoded."""
    seen: dict[str, int] = {}

    def watch(patch: pytest.MonkeyPatch, owner: type, name: str) -> None:
        real = getattr(owner, name)

        def watched(*args: Any, **kwargs: Any) -> Any:
            gc.collect()
            seen[name] = torch.cuda.memory_allocated()
            return real(*args, **kwargs)

        patch.setattr(owner, name, watched)

    gc.collect()
    with pytest.MonkeyPatch.context() as patch:
        watch(patch, VideoTokenizer, "encode")
        watch(patch, DecodeState, "feed")
        watch(patch, VideoTokenizer, "decode_parts")
        run(config)
    return seen


def test_offloading_frees_memory(tmp_path: Path) -> None:
    video = infer_case.write_input(tmp_path / "bar.mp4")
    settings: dict[str, dict[str, Any]] = {
        "warm": {},  # libraries keep what they allocate first
        "kept": {},
        "tokenizer": {"offload_tokenizer": True},
        "model": {"offload_ar_model": True},
    }
    used = {
        name: allocated(random_config(video, tmp_path / name, **changes))
        for name, changes in settings.items()
    }
    gc.collect()
    before = torch.cuda.memory_allocated()
    tokenizer = load_tokenizer(TOKENIZER, device="cuda")
    tokenizer_bytes = torch.cuda.memory_allocated() - before
    model = load_model("random:tiny", latent_shape=LATENT_SHAPE, vocab_size=tokenizer.vocab_size)
    model_bytes = torch.cuda.memory_allocated() - before - tokenizer_bytes
    assert min(tokenizer_bytes, model_bytes) > 1e6 and model.device == tokenizer.device
    kept = used["kept"]
    freed = kept["feed"] - used["tokenizer"]["feed"]
    assert freed >= 0.9 * tokenizer_bytes
    for stage in ("encode", "decode_parts"):
        assert kept[stage] - used["model"][stage] >= 0.9 * model_bytes


def test_ways_of_decoding_agree_on_a_gpu() -> None:
    model = load_model(AR_CASE, dtype="float32")
    given = prompt().repeat(3, 1)
    for settings in ({"temperature": 0.0}, {"top_p": 0.8, "seed": 3}, {"top_k": 50}):
        with full_float32():
            found = [
                generate(model, given, rest(model), decoding=way, **settings)
                for way in ("modules", "sequential", "jacobi")
            ]
        assert torch.equal(found[0], found[1]) and torch.equal(found[1], found[2]), settings


@pytest.mark.parametrize("decoding", ["sequential", "jacobi"])
@pytest.mark.parametrize("batch_size", [1, 3])
def test_graphs_replay_what_is_drawn_without_them(
    decoding: str,
    batch_size: int,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    replayed = []
    real = torch.cuda.CUDAGraph.replay

    def replay(graph: torch.cuda.CUDAGraph) -> None:
        replayed.append(graph)
        real(graph)

    monkeypatch.setattr(torch.cuda.CUDAGraph, "replay", replay)
    model = load_model(AR_CASE, dtype="float32")
    given = prompt().repeat(batch_size, 1)
    for settings in ({"temperature": 0.0}, {"top_p": 0.8, "seed": 3}, {"top_k": 50}):
        own = {**settings, "decoding": decoding, "window": 4}
        with full_float32():
            expected = generate(model, given, rest(model), cuda_graphs=False, **own)
            assert not replayed
            found = generate(model, given, rest(model), **own)
        assert torch.equal(found, expected), settings
        assert len(replayed) > 1
        replayed.clear()
    assert capsys.readouterr().err == ""


def test_the_cache_in_bfloat16_without_graphs() -> None:
    """As with them, see ``test_the_cache_in_bfloat16``: what is drawn is as likely."""
    model = load_model(AR_CASE, dtype="bfloat16")
    clips = []
    for cuda_graphs in (True, False):
        found = generate(model, prompt(), rest(model), temperature=0.0, cuda_graphs=cuda_graphs)
        clips.append(torch.cat([prompt().to(found), found], dim=1))
    for clip in clips:
        logits = model.logits(clip)[:, NUM_GIVEN - 1 : -1]
        drawn = logits.gather(2, clip[:, NUM_GIVEN:, None])[..., 0]
        assert (logits.amax(dim=2) - drawn).max() < 0.15
