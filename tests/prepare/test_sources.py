"""Lists of sources: one name for each file, however it is spelled, so that no split leaks."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from helpers.prepared import make_videos, prepare_small

from cosmos_posttrain.data import TokenDataset
from cosmos_posttrain.errors import UserError
from cosmos_posttrain.prepare.sources import from_folder, from_jsonl


def write_lines(path: Path, *lines: tuple[str, str | None]) -> Path:
    """A line for each name and prompt."""
    rows = [{"visual_input": name, "prompt": prompt} for name, prompt in lines]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_ordinary_names_and_paths_stay_as_they_are(tmp_path: Path) -> None:
    folder = tmp_path / "list"
    folder.mkdir()
    ordinary = ["a.mp4", "b/a.mp4", "../a.mp4", str(tmp_path / "c.mp4"), "ä b.mp4"]
    lines = write_lines(folder / "in.jsonl", *((name, None) for name in ordinary))
    found = from_jsonl(lines)
    assert [source.name for source in found] == ordinary
    assert [source.path for source in found] == [folder / name for name in ordinary]


def test_a_prompt_may_hold_what_unicode_calls_a_line_separator(tmp_path: Path) -> None:
    text = '{"visual_input": "a.mp4", "prompt": "one\u2028two\x85three"}\r\n'
    (tmp_path / "in.jsonl").write_text(text + "\n" + text.replace("a.mp4", "b.mp4"), newline="")
    found = from_jsonl(tmp_path / "in.jsonl")
    assert [source.prompt for source in found] == ["one\u2028two\x85three"] * 2


SPELLINGS = ["./a.mp4", "x/../a.mp4", "no/../a.mp4", ".//x/.././a.mp4", "link.mp4", "way/a.mp4"]


@pytest.mark.parametrize("other_first", [False, True])
@pytest.mark.parametrize("other", [*SPELLINGS, "{folder}/x/../a.mp4"])
def test_every_spelling_of_a_file_is_one_source(
    tmp_path: Path, other: str, other_first: bool
) -> None:
    (tmp_path / "x").mkdir()
    (tmp_path / "a.mp4").write_bytes(b"a")
    (tmp_path / "link.mp4").symlink_to("a.mp4")
    (tmp_path / "way").symlink_to(tmp_path)
    pair: list[tuple[str, str | None]] = [("a.mp4", "one"), (other.format(folder=tmp_path), "two")]
    if other_first:
        pair.reverse()
    found = from_jsonl(write_lines(tmp_path / "in.jsonl", *pair, ("b.mp4", None)))
    assert [source.prompt for source in found] == [prompt for _, prompt in pair] + [None]
    assert found[0].name == found[1].name != found[2].name
    assert found[0].path == found[1].path
    assert found[0].path.samefile(tmp_path / "a.mp4")


def test_dots_behind_a_linked_folder_lead_where_the_system_goes(tmp_path: Path) -> None:
    folder = tmp_path / "list"
    (tmp_path / "far" / "deep").mkdir(parents=True)
    folder.mkdir()
    (folder / "x").symlink_to(tmp_path / "far" / "deep")
    for parent in (folder, tmp_path / "far"):
        (parent / "a.mp4").write_text(parent.name)
    found = from_jsonl(write_lines(folder / "in.jsonl", ("x/../a.mp4", None), ("a.mp4", None)))
    assert [source.name for source in found] == ["../far/a.mp4", "a.mp4"]
    assert [source.path.read_text() for source in found] == ["far", "list"]


def test_a_repeated_line_is_left_out_with_a_note(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = [("a.mp4", None), ("./a.mp4", None), ("a.mp4", "text"), ("a.mp4", "text")]
    found = from_jsonl(write_lines(tmp_path / "in.jsonl", *lines))
    assert [(source.name, source.prompt) for source in found] == [
        ("a.mp4", None),
        ("a.mp4", "text"),
    ]
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "2 of 4 lines" in said and "in.jsonl" in said


@pytest.mark.parametrize("name", ["a\0.mp4", "\ud800.mp4", "\ud800/a.mp4", ""])
def test_text_that_can_be_no_path_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(UserError, match=r"line 1 of .* does not fit"):
        from_jsonl(write_lines(tmp_path / "in.jsonl", (name, None)))


def test_no_split_leaks_however_a_video_is_spelled(tmp_path: Path) -> None:
    videos = make_videos(tmp_path / "videos", 6)
    (videos / "again.mp4").symlink_to("0.mp4")
    spelled = ["0.mp4", "./0.mp4", "../videos/0.mp4", "again.mp4"]
    lines = [(name, f"text {number}") for number, name in enumerate(spelled)]
    lines += [(f"{number}.mp4", "text") for number in range(1, 6)]
    jsonl = write_lines(videos / "in.jsonl", *lines)
    output = tmp_path / "out"
    prepare_small(videos, output, input_videos_dir=None, input_jsonl=str(jsonl), videos_per_shard=2)
    for seed in range(8):
        splits = [
            TokenDataset(output, split=split, split_string="1,1,1", seed=seed)
            for split in ("train", "validation", "test")
        ]
        of_first = [{data.row(i).prompt for i in range(len(data))} for data in splits]
        wanted = {f"text {number}" for number in range(4)}
        assert [len(prompts & wanted) for prompts in of_first].count(4) == 1
        assert sum(len({data.source(i) for i in range(len(data))}) for data in splits) == 6


def test_a_folder_lists_each_file_once(tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "1.mp4").touch()
    (tmp_path / "a").symlink_to("b")
    (tmp_path / "b" / "0.mp4").symlink_to("1.mp4")
    assert [source.name for source in from_folder(tmp_path)] == ["b/1.mp4"]
