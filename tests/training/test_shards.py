"""The index over a set of shards: reading, caching, faults, many readers and builders."""

from __future__ import annotations

import pickle
import subprocess
import sys
import textwrap
import threading
from pathlib import Path

import pytest
from tars import pairs, peer_samples, write_tar

from ablate.errors import DataError
from ablate.training.data.shards import index_shards

TIMEOUT_S = 120


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    """A folder with three shards of 4, 5 and 6 samples."""
    folder = tmp_path / "shards"
    folder.mkdir()
    for shard in range(3):
        write_tar(folder / f"{shard}.tar", pairs(4 + shard, start=10 * shard))
    return folder


def run_python(code: str, *arguments: object) -> subprocess.Popen[str]:
    """Start a fresh interpreter on `code`."""
    command = [sys.executable, "-W", "error", "-c", textwrap.dedent(code)]
    return subprocess.Popen(
        [*command, *map(str, arguments)], stdout=subprocess.PIPE, text=True, stderr=subprocess.PIPE
    )


def finish(process: subprocess.Popen[str]) -> str:
    out, err = process.communicate(timeout=TIMEOUT_S)
    assert process.returncode == 0, err
    return out


def test_samples_are_the_peers_in_its_order(shards: Path) -> None:
    """Sample i is the i-th that open_clip_train reads from the shards, in the pattern's order."""
    index = index_shards(f"{shards}/{{2..0}}.tar", cache=None)
    peer = [pair for n in (2, 1, 0) for pair in peer_samples(shards / f"{n}.tar")]
    assert index.num_samples == len(peer) == 15
    assert [index.read(i) for i in range(15)] == [(image, text) for _, image, text in peer]
    assert [shard.num_samples for shard in index.shards] == [6, 5, 4]
    assert index.faults == ()


def test_numbers_outside_the_index_are_refused(shards: Path) -> None:
    """A negative number is a mistake of the caller, not the last sample."""
    index = index_shards(f"{shards}/0.tar", cache=None)
    for sample in (-1, 4):
        with pytest.raises(IndexError, match="of 4"):
            index.read(sample)


def test_a_sample_can_be_named(shards: Path) -> None:
    """Messages can say which shard and member a sample is."""
    index = index_shards(f"{shards}/{{0..2}}.tar", cache=None)
    assert index.describe(4) == f"{shards}/1.tar: 000000010.jpg"


def test_the_cache_gives_the_same_index(shards: Path, tmp_path: Path) -> None:
    """A second call reads nothing but the cache and gives the same samples and fingerprint."""
    pattern, cache = f"{shards}/{{0..2}}.tar", tmp_path / "cache"
    first = index_shards(pattern, cache=cache)
    kept = {path: path.stat().st_mtime_ns for path in cache.glob("*.npz")}
    assert len(kept) == 3
    second = index_shards(pattern, cache=cache)
    assert {path: path.stat().st_mtime_ns for path in cache.glob("*.npz")} == kept
    assert second.fingerprint == first.fingerprint and second.shards == first.shards
    assert [second.read(i) for i in range(15)] == [first.read(i) for i in range(15)]


def test_a_changed_shard_is_read_again(shards: Path, tmp_path: Path) -> None:
    """After a shard changes, the index and its fingerprint follow; the other entries stay."""
    pattern, cache = f"{shards}/{{0..2}}.tar", tmp_path / "cache"
    before = index_shards(pattern, cache=cache)
    write_tar(shards / "1.tar", pairs(9, start=50))
    after = index_shards(pattern, cache=cache)
    assert after.num_samples == before.num_samples + 4
    assert after.fingerprint != before.fingerprint
    assert len(list(cache.glob("*.npz"))) == 4


def test_a_damaged_cache_is_made_again(shards: Path, tmp_path: Path) -> None:
    """Cache files that are cut, empty or garbage are replaced, not believed."""
    pattern, cache = f"{shards}/{{0..2}}.tar", tmp_path / "cache"
    fingerprint = index_shards(pattern, cache=cache).fingerprint
    entries = sorted(cache.glob("*.npz"))
    entries[0].write_bytes(entries[0].read_bytes()[:300])
    entries[1].write_bytes(b"")
    entries[2].write_bytes(b"PK\x03\x04 garbage")
    again = index_shards(pattern, cache=cache)
    assert again.fingerprint == fingerprint and again.num_samples == 15
    assert index_shards(pattern, cache=cache).num_samples == 15


def test_faults_name_their_shard(shards: Path, tmp_path: Path) -> None:
    """Missing, unreadable and truncated shards are counted, and the others are used."""
    content = (shards / "1.tar").read_bytes()
    (shards / "1.tar").write_bytes(content[:5000])
    (shards / "3.tar").mkdir()
    for _ in range(2):  # fresh, then from the cache
        index = index_shards(f"{shards}/{{0..4}}.tar", cache=tmp_path / "cache")
        assert index.num_samples == 4 + 1 + 6
        assert index.num_faults == {"truncated": 1, "unreadable_shard": 1, "missing_shard": 1}
        assert [Path(fault.shard).stem for fault in index.faults] == ["1", "3", "4"]
    assert "1.tar: 1 x truncated (000000011)" in str(index.faults[0])


def test_nothing_readable_is_an_error_that_says_why(tmp_path: Path) -> None:
    """Only when no sample is left does the index raise, with the first faults in the message."""
    with pytest.raises(DataError, match="no usable sample.*missing_shard.*does not exist"):
        try:
            index_shards("{0..9}.tar", cache=None, root=tmp_path)
        except DataError as error:
            raise DataError(str(error).replace("\n", " ")) from error


def test_progress_is_told_shard_by_shard(shards: Path) -> None:
    """`on_shard` hears of every shard, in order, with the total."""
    heard: list[tuple[int, int]] = []
    index_shards(
        f"{shards}/{{0..2}}.tar",
        cache=None,
        on_shard=lambda done, total: heard.append((done, total)),
    )
    assert heard == [(1, 3), (2, 3), (3, 3)]


def test_a_shard_that_shrinks_is_noticed_at_reading(shards: Path) -> None:
    """Bytes of another file are never handed out as a sample."""
    index = index_shards(f"{shards}/{{0..2}}.tar", cache=None)
    (shards / "2.tar").write_bytes(b"short")
    (shards / "0.tar").unlink()
    with pytest.raises(DataError, match="changed after it was indexed"):
        index.read(14)
    with pytest.raises(DataError, match="cannot be opened any more"):
        index.read(0)
    assert index.read(4)[1] == "caption 10 ä"


def test_a_caption_that_is_no_text_is_left_out_and_counted(tmp_path: Path) -> None:
    """A caption in another encoding costs that sample alone, and is named with its place."""
    write_tar(tmp_path / "a.tar", [("x.jpg", b"i"), ("x.txt", b"caf\xe9"), *pairs(1)])
    index = index_shards(str(tmp_path / "a.tar"), cache=None)
    [fault] = index.faults
    assert str(fault).endswith("a.tar: 1 x caption_not_utf8 (x, byte 0xe9 at 3)")
    assert index.num_samples == 1 and index.read(0)[1] == "caption 0 ä"


def test_it_travels_between_processes(shards: Path) -> None:
    """A pickled index reads the same samples, without the open files of the first."""
    index = index_shards(f"{shards}/{{0..2}}.tar", cache=None)
    first = index.read(7)
    copy = pickle.loads(pickle.dumps(index))
    assert copy.read(7) == first and copy.fingerprint == index.fingerprint


def test_many_threads_may_read(shards: Path) -> None:
    """Concurrent readers of one index get the samples they asked for."""
    index = index_shards(f"{shards}/{{0..2}}.tar", cache=None)
    expected = [index.read(i) for i in range(15)]
    wrong: list[int] = []

    def read(start: int) -> None:
        for step in range(300):
            sample = (start + step) % 15
            if index.read(sample) != expected[sample]:
                wrong.append(sample)

    threads = [threading.Thread(target=read, args=(start,)) for start in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(TIMEOUT_S)
    assert wrong == []


def test_forked_readers_do_not_disturb_each_other(shards: Path) -> None:
    """Parent and forked child read through the same descriptors at the same time."""
    code = """
        import os, sys
        from ablate.training.data.shards import index_shards
        index = index_shards(sys.argv[1] + "/{0..2}.tar", cache=None)
        expected = [index.read(i) for i in range(15)]
        child = os.fork()
        good = all(index.read(i % 15) == expected[i % 15] for i in range(3000))
        if child == 0:
            os._exit(0 if good else 1)
        print(good, os.waitpid(child, 0)[1])
    """
    assert finish(run_python(code, shards)).split() == ["True", "0"]


def test_more_shards_than_file_descriptors(tmp_path: Path) -> None:
    """Reading goes on when there are more shards than the process may open files."""
    for shard in range(60):
        write_tar(tmp_path / f"{shard}.tar", pairs(1, start=shard))
    code = """
        import resource, sys
        resource.setrlimit(resource.RLIMIT_NOFILE, (40, 40))
        from ablate.training.data.shards import index_shards
        index = index_shards(sys.argv[1] + "/{0..59}.tar", cache=None)
        for turn in range(2):
            for sample in range(60):
                assert index.read(sample)[1] == f"caption {sample} ä"
        print(index.num_samples)
    """
    assert finish(run_python(code, tmp_path)).strip() == "60"


def test_concurrent_builders_agree(shards: Path, tmp_path: Path) -> None:
    """Processes that build the same index at once all get it, and the cache is whole."""
    cache = tmp_path / "cache"
    code = """
        import sys
        from pathlib import Path
        from ablate.training.data.shards import index_shards
        index = index_shards(sys.argv[1] + "/{0..2}.tar", cache=Path(sys.argv[2]))
        print(index.num_samples, index.fingerprint)
    """
    answers = [finish(p) for p in [run_python(code, shards, cache) for _ in range(3)]]
    assert len(set(answers)) == 1 and answers[0].startswith("15 ")
    assert len(list(cache.glob("*.npz"))) == 3 and not list(cache.glob(".*.tmp"))


def test_a_cache_that_cannot_be_written_says_so(shards: Path, tmp_path: Path) -> None:
    """A full or refused cache folder names itself and the way out."""
    code = """
        import resource, sys
        from pathlib import Path
        from ablate.training.data.shards import index_shards
        from ablate.errors import DataError
        import signal
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))
        try:
            index_shards(sys.argv[1] + "/{0..2}.tar", cache=Path(sys.argv[2]))
        except DataError as error:
            print(error)
    """
    out = finish(run_python(code, shards, tmp_path / "cache"))
    assert "cannot be kept in" in out and "choose another cache folder" in out
    assert not list((tmp_path / "cache").glob("*.npz"))
