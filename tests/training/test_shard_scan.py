"""Scanning one shard, against what open_clip_train reads from it and against `tarfile`."""

from __future__ import annotations

import hashlib
import io
import tarfile
from pathlib import Path

import pytest
import webdataset
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tars import Member, pairs, peer_samples, write_tar

from ablate.training.data.shard_scan import ShardScan, scan_shard
from ablate.training.data.shard_write import Sample, write_shard

ANY_FOLDER = settings(suppress_health_check=[HealthCheck.function_scoped_fixture])

KEYS = st.one_of(
    st.from_regex(r"[a-c]{1,2}", fullmatch=True),
    st.sampled_from(["d/e", "__meta__/x", "ä", "x" * 90, "y" * 120, "long/" * 25 + "z"]),
)
EXTENSIONS = st.sampled_from(["jpg", "txt", "JPG", "png", "jpeg", "webp", "json", "cls.txt"])
MEMBERS = st.lists(
    st.one_of(
        st.tuples(
            st.builds(lambda key, extension: f"{key}.{extension}", KEYS, EXTENSIONS),
            st.binary(min_size=1, max_size=1500),
        ),
        st.sampled_from([("folder/", b""), ("README", b"no key"), ("__index__", b"x")]),
    ),
    max_size=24,
)


def read_all(path: Path, scan: ShardScan) -> list[tuple[bytes, bytes]]:
    """(image, caption) of every sample of a scan."""
    data = path.read_bytes()
    return [
        (data[i : i + n], data[j : j + m])
        for i, n, j, m in zip(
            scan.image_offset, scan.image_length, scan.text_offset, scan.text_length, strict=True
        )
    ]


@ANY_FOLDER
@given(
    MEMBERS,
    st.sampled_from([tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT]),
)
def test_any_archive_gives_the_peers_samples(
    tmp_path: Path, members: list[Member], format: int
) -> None:
    """Every archive gives open_clip_train's samples in its order, but each key only once."""
    if format == tarfile.USTAR_FORMAT:
        members = [(name, data) for name, data in members if len(name) < 95 and name.isascii()]
    members = [
        (name, b"caption" if name.lower().endswith(".txt") else data) for name, data in members
    ]
    path = write_tar(tmp_path / "any.tar", members, format=format)
    peer = peer_samples(path)
    first = {key: (image, caption.encode()) for key, image, caption in reversed(peer)}
    order = list(dict.fromkeys(key for key, _, _ in peer))
    scan = scan_shard(str(path))
    assert read_all(path, scan) == [first[key] for key in order]
    duplicates = scan.faults.get("duplicate_key", (0, ()))[0]
    assert duplicates == len(peer) - len(order)
    assert scan.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    assert scan.size == path.stat().st_size


def test_webdatasets_own_writer_is_read(tmp_path: Path) -> None:
    """Shards of webdataset's writer, which puts a pax header before every member, are read."""
    path = tmp_path / "peer.tar"
    with webdataset.TarWriter(str(path)) as writer:
        for number in range(20):
            writer.write({"__key__": f"{number:05d}", "jpg": b"i%d" % number, "txt": f"t{number}"})
    with tarfile.open(path) as tar:
        first = tar.next()
        assert first is not None and first.pax_headers
    scan = scan_shard(str(path))
    assert read_all(path, scan) == [(b"i%d" % n, b"t%d" % n) for n in range(20)]
    assert scan.faults == {}


def test_members_larger_than_the_reading_window(tmp_path: Path) -> None:
    """Members of several megabytes, which no single read holds, are located exactly."""
    members = [("a.jpg", b"\x01" * 9_000_001), ("a.txt", b"big"), *pairs(3)]
    path = write_tar(tmp_path / "big.tar", members)
    scan = scan_shard(str(path))
    assert read_all(path, scan)[0] == (members[0][1], b"big")
    assert len(scan.image_offset) == 4 and scan.faults == {}


def test_faults_are_counted_and_the_rest_is_kept(tmp_path: Path) -> None:
    """Samples without caption or image and repeated keys are counted by kind and named."""
    path = write_tar(
        tmp_path / "faulty.tar",
        [
            *pairs(2),
            ("no_caption.jpg", b"i"),
            ("empty_caption.jpg", b"i"),
            ("empty_caption.txt", b""),
            ("no_image.txt", b"t"),
            *pairs(1),
            *pairs(2, start=7),
        ],
    )
    scan = scan_shard(str(path))
    assert len(scan.image_offset) == 4
    assert scan.faults == {
        "missing_caption": (2, ("no_caption", "empty_caption")),
        "missing_image": (1, ("no_image",)),
        "duplicate_key": (1, ("000000000",)),
    }


def test_many_faults_are_counted_but_few_are_named(tmp_path: Path) -> None:
    """A shard without captions costs no memory for names."""
    path = write_tar(tmp_path / "bare.tar", [(f"{n}.jpg", b"i") for n in range(100)])
    count, examples = scan_shard(str(path)).faults["missing_caption"]
    assert count == 100 and len(examples) == 5


@ANY_FOLDER
@given(st.data())
def test_a_cut_file_gives_the_samples_before_the_cut(tmp_path: Path, data: st.DataObject) -> None:
    """Wherever a shard ends too early, its complete samples are read and the loss is recorded."""
    whole = write_tar(tmp_path / "whole.tar", pairs(6))
    content = whole.read_bytes()
    samples = read_all(whole, scan_shard(str(whole)))
    used = 6 * 3 * 1024  # a header and a block of data for each member
    cut = data.draw(st.integers(1, used))
    path = tmp_path / "cut.tar"
    path.write_bytes(content[:cut])
    scan = scan_shard(str(path))
    read = read_all(path, scan)
    assert read == samples[: len(read)]
    assert set(scan.faults) <= {"truncated", "no_end_marker"} and scan.faults
    if cut == used:
        assert len(read) == 6


@ANY_FOLDER
@given(st.lists(st.tuples(st.integers(0, 10_000), st.integers(0, 255)), min_size=1, max_size=8))
def test_a_damaged_file_is_read_as_far_as_it_goes(
    tmp_path: Path, damage: list[tuple[int, int]]
) -> None:
    """Random bytes in a shard never stop the scan, and never point outside the file."""
    path = write_tar(tmp_path / "damaged.tar", pairs(5), format=tarfile.PAX_FORMAT)
    content = bytearray(path.read_bytes())
    for place, value in damage:
        content[place] = value
    path.write_bytes(content)
    scan = scan_shard(str(path))
    assert (scan.image_offset + scan.image_length <= len(content)).all()
    assert (scan.text_offset + scan.text_length <= len(content)).all()


@pytest.mark.parametrize(
    ("content", "kind"),
    [
        (b"", "unreadable_shard"),
        (b"\x1f\x8b\x08 not a plain tar" * 100, "unreadable_shard"),
        (bytes(10240), "empty_shard"),
    ],
    ids=["no bytes", "compressed", "zeros"],
)
def test_files_that_are_no_archive(tmp_path: Path, content: bytes, kind: str) -> None:
    """A file that is empty, compressed or only zeros is a fault of its shard, not a crash."""
    path = tmp_path / "bad.tar"
    path.write_bytes(content)
    scan = scan_shard(str(path))
    assert list(scan.faults) == [kind] and len(scan.image_offset) == 0


def test_a_damaged_header_ends_the_shard_there(tmp_path: Path) -> None:
    """What comes before a damaged header is kept, and the place of the damage is recorded."""
    path = write_tar(tmp_path / "damaged.tar", pairs(4))
    with tarfile.open(path) as tar:
        place = tar.getmembers()[6].offset  # the image of the third sample
    content = bytearray(path.read_bytes())
    content[place + 10] ^= 0xFF
    path.write_bytes(content)
    scan = scan_shard(str(path))
    assert len(scan.image_offset) == 2
    assert scan.faults == {"damaged_header": (1, (f"byte {place}",))}


def test_a_sparse_member_ends_the_shard_with_a_reason(tmp_path: Path) -> None:
    """A member whose data cannot be read as one piece is named, not misread."""
    path = tmp_path / "sparse.tar"
    with tarfile.open(path, "w") as tar:
        for name, data in pairs(1):
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
        odd = tarfile.TarInfo("odd.jpg")
        odd.type = tarfile.GNUTYPE_SPARSE
        tar.addfile(odd)
    scan = scan_shard(str(path))
    assert len(scan.image_offset) == 1
    assert scan.faults == {"unsupported_member": (1, ("odd.jpg",))}


def test_written_shards_are_fixed_bytes(tmp_path: Path) -> None:
    """The same samples give the same file, which the peer reads, and no temporary is left."""
    samples = [Sample(key=f"{n:04d}", image=bytes([n]) * 700, caption=f"ü {n}") for n in range(9)]
    first, second = tmp_path / "a.tar", tmp_path / "b.tar"
    assert write_shard(first, samples) == write_shard(second, iter(samples)) == 9
    assert first.read_bytes() == second.read_bytes()
    assert peer_samples(first) == [(s.key, s.image, s.caption) for s in samples]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.tar", "b.tar"]


def test_an_interrupted_write_leaves_nothing(tmp_path: Path) -> None:
    """A writer whose samples fail leaves neither half a shard nor a temporary file."""

    def failing():  # type: ignore[no-untyped-def]
        yield Sample(key="0", image=b"i", caption="t")
        raise RuntimeError("the source failed")

    with pytest.raises(RuntimeError, match="source"):
        write_shard(tmp_path / "a.tar", failing())
    assert list(tmp_path.iterdir()) == []


@ANY_FOLDER
@given(st.permutations([f"{key}.{kind}" for key in "abcd" for kind in ("jpg", "txt")]))
def test_torn_samples_are_counted_once(tmp_path: Path, names: list[str]) -> None:
    """Whatever order the members stand in: each key is a sample, or one that is not adjacent."""
    path = write_tar(tmp_path / "any.tar", [(name, b"x") for name in names])
    scan = scan_shard(str(path))
    torn, examples = scan.faults.pop("not_adjacent", (0, ()))
    assert scan.faults == {} and len(scan.image_offset) + torn == 4 and len(examples) == torn


@ANY_FOLDER
@given(st.binary(min_size=1, max_size=40))
def test_captions_are_utf8_or_counted(tmp_path: Path, caption: bytes) -> None:
    """A caption is read, or its place is told; nothing in between."""
    path = write_tar(tmp_path / "one.tar", [("a.jpg", b"i"), ("a.txt", caption)])
    scan = scan_shard(str(path))
    try:
        caption.decode("utf-8")
    except UnicodeDecodeError as error:
        where = f"a, byte 0x{caption[error.start]:02x} at {error.start}"
        assert scan.faults == {"caption_not_utf8": (1, (where,))} and not len(scan.text_offset)
    else:
        assert scan.faults == {} and len(scan.text_offset) == 1
