"""Lists of videos: sorted, each file once, whatever links there are."""

from __future__ import annotations

from pathlib import Path

import pytest

from cosmos_posttrain.errors import UserError
from cosmos_posttrain.video import list_videos
from cosmos_posttrain.video.files import find_files


def test_list_videos_is_sorted_recursive_and_skips_hidden_files(tmp_path):
    for name in ["b/2.MP4", "b.mp4", "a/1.webm", ".hidden.mp4", ".git/3.mp4", "a/notes.txt"]:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    found = [path.relative_to(tmp_path).as_posix() for path in list_videos(tmp_path)]
    assert found == ["a/1.webm", "b.mp4", "b/2.MP4"]
    with pytest.raises(UserError, match="does not exist"):
        list_videos(tmp_path / "nowhere")
    (tmp_path / "none").mkdir()
    with pytest.raises(UserError, match="holds no video"):
        list_videos(tmp_path / "none")


def make(root: Path, *names: str) -> None:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()


def listed(root: Path) -> list[str]:
    return [path.relative_to(root).as_posix() for path in list_videos(root)]


def test_links_that_lead_back_end_and_nothing_is_listed_twice(tmp_path: Path) -> None:
    root = tmp_path / "videos"
    make(root, "1.mp4", "m/2.mp4", "m/n/3.mp4")
    (root / "m" / "n" / "up").symlink_to("..")
    (root / "m" / "all").symlink_to(root)
    (root / "a").symlink_to("m/n")
    (root / "self").symlink_to("self")
    (root / "parent").symlink_to(tmp_path)
    assert listed(root) == ["1.mp4", "m/2.mp4", "m/n/3.mp4"]
    make(root, "z/4.mp4")  # with or without links, what is there keeps its name
    assert listed(root) == ["1.mp4", "m/2.mp4", "m/n/3.mp4", "z/4.mp4"]


def test_links_out_of_the_folder_are_followed_once(tmp_path: Path) -> None:
    root = tmp_path / "videos"
    make(tmp_path / "far", "1.mp4", "deep/2.mp4", "notes.txt")
    make(tmp_path / "cache", "blob")
    make(root, "0.mp4")
    (root / "b").symlink_to(tmp_path / "far")
    (root / "a").symlink_to(tmp_path / "far")
    (root / "deep").symlink_to(tmp_path / "far" / "deep")
    (root / "named.mp4").symlink_to(tmp_path / "cache" / "blob")
    (root / "twice.mp4").symlink_to(tmp_path / "cache" / "blob")
    (root / "first.mp4").symlink_to("0.mp4")
    (root / "one.mp4").symlink_to(tmp_path / "far" / "1.mp4")
    assert listed(root) == ["0.mp4", "a/1.mp4", "a/deep/2.mp4", "named.mp4"]


def test_links_that_lead_nowhere_are_listed_to_be_reported(tmp_path: Path) -> None:
    make(tmp_path, "0.mp4")
    (tmp_path / "lost.mp4").symlink_to("gone.mp4")
    (tmp_path / "self.mp4").symlink_to("self.mp4")
    assert listed(tmp_path) == ["0.mp4", "lost.mp4", "self.mp4"]


def test_the_order_does_not_depend_on_the_file_system(tmp_path: Path) -> None:
    """``a.b/`` sorts before ``a/``, as whole paths do."""
    names = ["b.mp4", "a/2.mp4", "a/1.mp4", "a.b/1.mp4", "a.mp4", "Z.mp4"]
    for number, order in enumerate((names, names[::-1])):
        make(tmp_path / str(number), *order)
        assert listed(tmp_path / str(number)) == sorted(names)


def test_a_folder_can_be_left_out(tmp_path: Path) -> None:
    make(tmp_path, "a.mp4", "out/b.mp4")
    (tmp_path / "link").symlink_to("out")
    assert find_files(tmp_path, {".mp4"}, tmp_path / "out") == [tmp_path / "a.mp4"]
    assert len(find_files(tmp_path, {".mp4"}, tmp_path)) == 2
