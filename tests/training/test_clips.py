"""Clips: found, read frame by frame, cut alike, and the set that the package draws."""

from __future__ import annotations

import json
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from PIL import Image

from ablate.errors import DataError
from ablate.training.data.clip_samples import ClipSamples
from ablate.training.data.clips import count_frames, find_clips, read_frames
from ablate.training.data.emoji_video import MOTIONS
from ablate.training.data.frames import FrameChoice, TrainCut, ViewCut
from ablate.training.evaluations.clips import EvalClips

GREYS = tuple(range(20, 240, 20))


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One clip of frames of rising grey in four forms, as class folders."""
    root = tmp_path_factory.mktemp("clips")
    for name in ("video", "picture"):
        (root / name).mkdir()
    frames = [Image.new("RGB", (32, 32), (grey,) * 3) for grey in GREYS]
    with av.open(str(root / "video" / "a.mp4"), "w") as file:
        stream = file.add_stream("mpeg4", rate=10)
        stream.width, stream.height, stream.pix_fmt, stream.bit_rate = 32, 32, "yuv420p", 4_000_000
        for frame in frames:
            for packet in stream.encode(av.VideoFrame.from_image(frame)):
                file.mux(packet)
        for packet in stream.encode():
            file.mux(packet)
    frames[0].save(root / "picture" / "a.gif", save_all=True, append_images=frames[1:])
    frames[0].save(
        root / "picture" / "b.webp", save_all=True, append_images=frames[1:], lossless=True
    )
    strip = Image.new("RGB", (32 * len(frames), 32))
    for number, frame in enumerate(frames):
        strip.paste(frame, (32 * number, 0))
    strip.save(root / "picture" / "c.png")
    return root


def test_every_form_of_a_clip_gives_the_same_frames(drawn: Path) -> None:
    """A video, an animated GIF and WebP and a strip: all have their frames in order; frames are
    given in the order in which they are asked for."""
    source = find_clips(str(drawn))
    assert source.classes == ("picture", "video") and source.labels.tolist() == [0, 0, 0, 1]
    for path in source.paths:
        assert count_frames(path) == len(GREYS)
        means = read_frames(path).mean(axis=(1, 2, 3))
        assert np.abs(means - GREYS).max() < 4, path.name
        some = read_frames(path, [7, 2, 2]).mean(axis=(1, 2, 3))
        assert np.abs(some - np.array(GREYS)[[7, 2, 2]]).max() < 4, path.name


def test_lists_name_clips_and_what_is_no_clip_is_said(drawn: Path, tmp_path: Path) -> None:
    """A list of paths and class numbers, and one of captions; a bad line is named; a file that is
    no clip is a bad sample with a reason, and is not left out in silence."""
    labelled = drawn / "list.csv"
    labelled.write_text("video/a.mp4 1\npicture/c.png,0\n")
    found = find_clips(str(labelled))
    assert found.labels.tolist() == [1, 0] and [p.name for p in found.paths] == ["a.mp4", "c.png"]
    (drawn / "list.json").write_text(json.dumps([{"video": "picture/c.png", "caption": "grey"}]))
    assert find_clips(str(drawn / "list.json")).texts == ("grey",)
    labelled.write_text("video/a.mp4 first\n")
    with pytest.raises(DataError, match="line 1: 'video/a.mp4 first' is no path and class number"):
        find_clips(str(labelled))
    labelled.unlink()
    for name in ("x", "y"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "a.mp4").write_bytes(b"no video")
    samples = ClipSamples(
        find_clips(str(tmp_path)), choice=FrameChoice(2, 1), cut=TrainCut(8, (8, 8), flip=False)
    )
    _, bad = samples.batch(np.array([0, 1]), np.array([1, 2], np.uint64))
    assert bad.tolist() == [True, True] and "cannot be read as a clip" in samples.explain(0)


def test_frames_are_chosen_within_the_clip() -> None:
    """A span lies within the clip, frames are sampling_rate apart, of a short clip spread over the
    whole of it; moments of an evaluation share it evenly; the controls take time away."""
    choice = FrameChoice(4, 8)
    drawn = [choice.drawn(100, np.uint64(seed)) for seed in range(200)]
    assert all((np.diff(numbers) == 8).all() for numbers in drawn)
    assert min(n[0] for n in drawn) == 0 and max(n[-1] for n in drawn) == 100 - 32 + 24
    assert choice.drawn(8, np.uint64(3)).tolist() == [0, 2, 4, 6]
    assert choice.drawn(1, np.uint64(3)).tolist() == [0, 0, 0, 0]
    starts = [int(choice.view(100, view, 3)[0]) for view in range(3)]
    assert starts == [11, 34, 57]  # of 69 places, the middles of three thirds
    shuffled = FrameChoice(4, 8, "shuffled").drawn(100, np.uint64(5))
    assert shuffled.tolist() != sorted(shuffled) and set(shuffled) == set(
        choice.drawn(100, np.uint64(5))
    )
    assert len(set(FrameChoice(4, 8, "first_only").drawn(100, np.uint64(5)))) == 1


def test_a_clip_is_cut_alike_in_all_its_frames() -> None:
    """A square of the asked size at one place for all frames, mirrored or not; of an evaluation
    three places along the long side."""
    picture = np.zeros((6, 20, 40, 3), np.uint8)
    picture[..., 0] = np.arange(40)[None, None, :] * 6
    cuts = [TrainCut(16, (18, 24), flip=True)(picture, np.uint64(seed)) for seed in range(40)]
    assert {tuple(cut.shape) for cut in cuts} == {(6, 3, 16, 16)}
    assert all(torch.equal(cut, cut[:1].expand_as(cut)) for cut in cuts)
    rising = [bool(cut[0, 0, 0, 0] < cut[0, 0, 0, -1]) for cut in cuts]
    assert 8 < sum(rising) < 32
    places = [int(ViewCut(20, 3)(picture, crop)[0, 0, 0, 0]) // 6 for crop in range(3)]
    assert places == [0, 10, 20]


def test_cached_clips_are_the_clips(drawn: Path, data: Path) -> None:
    """The same samples and views come from the cache as from the files."""
    source = find_clips(str(drawn))
    choice, ids, seeds = FrameChoice(4, 2), np.arange(4), np.arange(4, dtype=np.uint64)
    batches = [
        ClipSamples(
            source, choice=choice, cut=TrainCut(16, (20, 24), flip=True), cache_gib=gib
        ).batch(ids, seeds)
        for gib in (0.0, 1.0)
    ]
    for plain, cached in zip(batches[0][0], batches[1][0], strict=True):
        assert torch.equal(plain, cached)
    views = [
        EvalClips(source, choice=choice, cut=ViewCut(16, 3), views=2, cache_gib=gib).views_of(3)
        for gib in (0.0, 1.0)
    ]
    assert views[0].shape == (6, 4, 3, 16, 16) and torch.equal(views[0], views[1])


@pytest.mark.exhaustive
def test_the_drawn_set_is_whole_and_its_first_frames_tell_no_motion(
    emoji_video: Path,
) -> None:
    """1536 clips and 384 held out, each class alike; a held-out thing never moved so in training;
    every clip moves but those that stand still, and begins at a place that says no class."""
    train, val = (find_clips(str(emoji_video / split)) for split in ("train", "val"))
    assert np.bincount(train.labels).tolist() == [128] * 12
    assert np.bincount(val.labels).tolist() == [32] * 12
    captions = {
        split: [row["caption"] for row in json.loads((emoji_video / f"{split}.json").read_text())]
        for split in ("train", "val")
    }
    assert len(set(captions["val"])) == 384 and not set(captions["val"]) & set(captions["train"])
    moved, first = {}, {}
    for path, label in zip(train.paths, train.labels.tolist(), strict=True):
        frames = read_frames(path).astype(float)
        change = np.abs(frames - frames[:1]).mean()
        moved.setdefault(train.classes[label], []).append(change)
        apart = np.abs(frames[0] - frames[0][0, 0]).sum(axis=2)
        if apart.sum():
            first.setdefault(label, []).append((apart.sum(axis=0) @ np.arange(32)) / apart.sum())
    assert max(moved["still"]) == 0 and set(moved) == set(MOTIONS)
    assert all(min(change) > 0.5 for motion, change in moved.items() if motion != "still")
    middles = [float(np.mean(places)) for places in first.values()]
    assert max(middles) - min(middles) < 1.5  # pixels; one deviation of a mean is about 0.3
