"""Embeddings are transformers' own, whatever is batched with what; long prompts are cut, loudly."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from helpers import t5

import cosmos_posttrain
from cosmos_posttrain.errors import ConfigError, TextError
from cosmos_posttrain.text import TextEncoder, load_text_encoder


@pytest.fixture(scope="module")
def tiny() -> TextEncoder:
    return load_text_encoder("tiny", device="cpu")


@pytest.mark.parametrize("padding", [True, False], ids=["padded", "one by one"])
@pytest.mark.parametrize("batch_size", [1, 3, 8])
def test_embeddings_equal_transformers_own(
    tiny: TextEncoder, padding: bool, batch_size: int
) -> None:
    expected = t5.transformers_rows(t5.TINY, t5.PROMPTS, tiny.context_len, padding)
    context = tiny.embed(t5.PROMPTS, batch_size)
    assert context.shape == (8, 32, 64) and context.dtype == torch.float32
    # Sums of float32 in another order; the values' mean square is 1.
    torch.testing.assert_close(context, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("gated", [False, True], ids=["T5 1.0", "T5 1.1"])
def test_a_t5_of_either_kind_gives_what_transformers_gives(tmp_path: Path, gated: bool) -> None:
    folder = t5.write_t5(tmp_path, gated=gated)
    encoder = load_text_encoder(folder, device="cpu")
    assert (encoder.width, encoder.context_len) == (32, 20)  # both from its config.json
    expected = t5.transformers_rows(folder, t5.PROMPTS, 20, padding=True)
    for batch_size in (1, 8):
        context = encoder.embed(t5.PROMPTS, batch_size)
        # Three layers of larger weights; the largest value is about 4.
        torch.testing.assert_close(context, expected, rtol=0, atol=3e-6)


def test_rows_end_with_the_prompt_and_padding_is_zero(tiny: TextEncoder) -> None:
    rows = tiny.encode(t5.PROMPTS)
    tokens = tiny.tokenize(t5.PROMPTS)
    assert [len(row) for row in rows] == [len(item.ids) for item in tokens]
    assert all(item.ids[-1] == 1 for item in tokens)  # </s>
    for row, padded in zip(rows, tiny.embed(t5.PROMPTS), strict=True):
        assert torch.equal(padded[: len(row)], row)
        assert not padded[len(row) :].any()
        assert row.any(dim=1).all()


def test_a_prompt_that_comes_again_is_encoded_once(
    tiny: TextEncoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    batches = []
    run = tiny._run
    monkeypatch.setattr(tiny, "_run", lambda batch: (batches.append(len(batch)), run(batch))[1])
    rows = tiny.encode(["a ball", "a box", "a ball", "a ball"], batch_size=8)
    assert batches == [2]
    assert torch.equal(rows[0], rows[2]) and not torch.equal(rows[0], rows[1])


def test_which_prompts_run_together_depends_on_the_list_alone(tiny: TextEncoder) -> None:
    tokens = tiny.tokenize(t5.PROMPTS)
    first, again = tiny.encode_tokens(tokens, 3), tiny.encode_tokens(tokens, 3)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    with pytest.raises(ConfigError, match="batch_size is 0"):
        tiny.encode_tokens(tokens, 0)


def test_a_long_prompt_is_cut_with_a_warning_that_says_where(
    tiny: TextEncoder, capsys: pytest.CaptureFixture[str]
) -> None:
    kept = " ".join(["ball"] * 31)  # and </s>
    long = f"{kept} moves to the left and then to the right again"
    (cut,) = tiny.encode([long])
    message = capsys.readouterr().err
    assert message.count("\n") == 1 and message.startswith("warning: the prompt ")
    assert "has 42 tokens, but the text encoder takes 32" in message
    assert f"cut from character {len(kept) + 1} on" in message
    assert '"moves to the left and then ..."' in message
    (whole,) = tiny.encode([kept])
    assert capsys.readouterr().err == ""
    assert torch.equal(cut, whole)  # the end of the long one is gone, and nothing else


def test_ten_thousand_words_are_cut_and_many_warnings_become_one(
    tiny: TextEncoder, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = tiny.encode([f"{number} " + "unheard-of words " * 5000 for number in range(13)])
    assert {len(row) for row in rows} == {32}
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 11 and lines[-1] == "warning: 3 more prompts are cut."
    assert max(map(len, lines)) < 300


@pytest.mark.parametrize(
    ("prompts", "sentence"),
    [
        (["a ball", ""], "prompt 2 of 2 is empty"),
        ([" \n\t"], "prompt 1 of 1 is empty"),
        (["a", None], "prompt 2 of 2 is a NoneType"),
        ("a ball", "prompts come as a list"),
        (["half \ud83d of a character"], "1 of 1 is .half.*half a character at place 5"),
        ([], "no prompt to encode"),
    ],
)
def test_what_is_no_prompt_is_refused(tiny: TextEncoder, prompts: list[str], sentence: str) -> None:
    with pytest.raises(TextError, match=sentence) as error:
        tiny.embed(prompts)
    assert "\n" not in str(error.value)


def test_values_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    encoder = load_text_encoder("tiny", device="cpu")
    encoder._model.encoder.final_layer_norm.weight[5] = float("inf")
    with pytest.raises(TextError, match=r'not finite of the prompt "a ball"'):
        encoder.encode(["a ball"])


def test_bfloat16_is_float32_up_to_rounding(tiny: TextEncoder) -> None:
    rounded = load_text_encoder("tiny", device="cpu", dtype="bfloat16")
    assert rounded.dtype == torch.bfloat16 and rounded.sha256 == tiny.sha256
    difference = (rounded.embed(t5.PROMPTS).float() - tiny.embed(t5.PROMPTS)).abs()
    # bfloat16 has 8 bits; a few layers deep the errors of values around 1 stay near 1/128.
    assert 0 < difference.mean() < 0.02
    with pytest.raises(ConfigError, match="float16, in which T5 overflows"):
        load_text_encoder("tiny", device="cpu", dtype="float16")


def test_embeddings_can_be_trained_on(tiny: TextEncoder) -> None:
    """They are no inference tensors, which autograd refuses."""
    linear = torch.nn.Linear(64, 2)
    linear(tiny.embed(["a ball"])).sum().backward()
    assert linear.weight.grad is not None


def test_it_moves_and_is_freed() -> None:
    encoder = cosmos_posttrain.load_text_encoder("tiny", device="cpu")
    before = encoder.embed(["a ball"])
    assert encoder.to("cpu") is encoder
    assert torch.equal(encoder.embed(["a ball"]), before)
    sha256 = encoder.sha256
    encoder.close()
    assert encoder._model is None and encoder.sha256 == sha256
    with pytest.raises(AssertionError, match="closed"):
        encoder.encode(["a ball"])


@pytest.mark.gpu
def test_on_a_gpu_it_gives_the_same_and_leaves_nothing_behind(tiny: TextEncoder) -> None:
    torch.backends.cuda.matmul.allow_tf32 = False
    encoder = load_text_encoder("tiny", device="cuda")
    assert encoder.device.type == "cuda" and encoder.dtype == torch.float32
    context = encoder.embed(t5.PROMPTS)
    torch.testing.assert_close(context.cpu(), tiny.embed(t5.PROMPTS), rtol=0, atol=1e-5)
    del context
    encoder.to("cpu")
    without = torch.cuda.memory_allocated()  # cuBLAS keeps a workspace
    assert torch.equal(encoder.embed(["a"]), tiny.embed(["a"]))
    encoder.to("cuda").embed(["a"])
    assert torch.cuda.memory_allocated() > without
    encoder.close()
    assert torch.cuda.memory_allocated() == without
