"""WebDataset shards without the webdataset library: an index that reads any sample by number.

A shard is a tar file in which neighbouring members with the same key (path up to the first dot of
the last part) make one sample: ``000000012.jpg`` + ``000000012.txt``. Streaming such files ties
the order of samples to workers, buffers and process ids; with an index (offset and length of each
image and caption) position -> sample is a lookup, so the data order can be ours, and resuming is
one integer. The index is built in one sequential pass that also takes each shard's sha256, and is
cached per shard by path, size and modification time::

    index = index_shards("/data/cc3m-train-{0000..0575}.tar", cache=Path("/data/.ablate-index"))
    image, caption = index.read(1_234_567)

What belongs to a sample follows open_clip_train 3.3.0 (`group_by_keys_nothrow`,
`filter_no_caption_or_no_image`, the order of image types in `rename`), so a clean shard gives the
same samples in the same order. What open_clip_train skips without a word is counted here as faults.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
import resource
import secrets
import tarfile
import threading
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt
from filelock import FileLock

from ablate.errors import DataError

IMAGE_TYPES = ("jpg", "png", "jpeg", "webp")
"""Extensions of image members; the first that a sample has is taken, as open_clip_train does."""

CAPTION_TYPE = "txt"

MAX_SHARDS = 1_000_000
"""A pattern that gives more is a slip of the keyboard."""

FORMAT = 1
"""Version of the cached index; raise it when reading gives something else for the same shard."""

MAX_MEMBER_BYTES = 2**31 - 1

_BLOCK = 512
_NAME_BYTES = 100
_CHUNK = 8192 * _BLOCK
_EXAMPLES = 5
_META = re.compile(r"__[^/]*__($|/)")
"""Members that webdataset skips: ``__index__`` and the like, and folders of such names."""
_PAX_RECORD = re.compile(rb"(\d+) ([^=]+)=")

FAULTS = {
    "missing_shard": "the file does not exist",
    "unreadable_shard": "the file cannot be read as a tar archive",
    "truncated": "the archive ends in the middle of a member",
    "no_end_marker": "the archive ends between two members, without the closing zero block",
    "damaged_header": "a member's header is damaged; the rest of the shard is not read",
    "unsupported_member": "a member no image has (sparse, over 2 GiB); the rest is not read",
    "missing_caption": "a sample without .txt, or with an empty one",
    "missing_image": "a sample without .jpg, .png, .jpeg or .webp, or with an empty one",
    "duplicate_key": "a key seen before in the same shard; the first sample is kept",
}
"""Kinds of faults and what they mean."""


@dataclass(frozen=True, slots=True)
class Sample:
    """One pair to be written into a shard."""

    key: str
    image: bytes
    caption: str
    image_type: str = "jpg"


@dataclass(frozen=True, slots=True)
class Fault:
    """Faults of one kind (see FAULTS) in one shard, with the keys or members of the first few."""

    shard: str
    kind: str
    count: int
    examples: tuple[str, ...]

    def __str__(self) -> str:
        examples = f" ({', '.join(self.examples)})" if self.examples else ""
        return f"{self.shard}: {self.count} x {self.kind}{examples}"


@dataclass(frozen=True, slots=True)
class Shard:
    """What was found about one shard: its bytes, and the samples that can be used."""

    path: str
    size: int
    sha256: str
    num_samples: int


@dataclass(frozen=True, slots=True)
class _Scan:
    """One scanned shard, as it is cached. Arrays have shape (samples,)."""

    size: int
    sha256: str
    image_offset: npt.NDArray[np.int64]
    image_length: npt.NDArray[np.int32]
    text_offset: npt.NDArray[np.int64]
    text_length: npt.NDArray[np.int32]
    faults: dict[str, tuple[int, tuple[str, ...]]]


class _OpenShard:
    """A file descriptor that is closed with its last user."""

    __slots__ = ("fd", "path")

    def __init__(self, path: str, size: int) -> None:
        self.fd = -1
        self.path = path
        try:
            self.fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise DataError(f"shard {path} cannot be opened any more: {error.strerror}") from error
        found = os.fstat(self.fd).st_size
        if found != size:
            raise DataError(
                f"shard {path} was changed after it was indexed: {size} bytes then, {found} now; "
                "start again, so that the index is built again"
            )

    def __del__(self) -> None:
        if self.fd >= 0:
            os.close(self.fd)


class _OpenShards:
    """The descriptors in use, at most half of what the process may open.

    A forked child may go on using its parent's: `os.pread` moves no shared position. Pickling
    leaves them behind.
    """

    def __init__(self) -> None:
        soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        self._limit = max(8, min(soft, 8192) // 2)
        self._open: OrderedDict[str, _OpenShard] = OrderedDict()
        self._lock = threading.Lock()
        os.register_at_fork(after_in_child=self._renew_lock)

    def _renew_lock(self) -> None:
        self._lock = threading.Lock()

    def __reduce__(self) -> tuple[type[_OpenShards], tuple[()]]:
        return _OpenShards, ()

    def get(self, path: str, size: int) -> _OpenShard:
        with self._lock:
            shard = self._open.get(path)
            if shard is None:
                shard = self._open[path] = _OpenShard(path, size)
                if len(self._open) > self._limit:
                    self._open.popitem(last=False)
            else:
                self._open.move_to_end(path)
            return shard


@dataclass(frozen=True, slots=True, eq=False)
class ShardIndex:
    """Where every usable sample of a set of shards lies. Sample numbers follow the shards' order.

    The arrays have shape (num_samples,) and take 28 bytes a sample: 81 MB for CC3M.
    """

    shards: tuple[Shard, ...]
    shard_id: npt.NDArray[np.int32]
    image_offset: npt.NDArray[np.int64]
    image_length: npt.NDArray[np.int32]
    text_offset: npt.NDArray[np.int64]
    text_length: npt.NDArray[np.int32]
    faults: tuple[Fault, ...]
    _open: _OpenShards = field(default_factory=_OpenShards, repr=False)

    @property
    def num_samples(self) -> int:
        return len(self.shard_id)

    @property
    def num_faults(self) -> dict[str, int]:
        """Faults by kind; kinds that did not occur are absent."""
        total: dict[str, int] = {}
        for fault in self.faults:
            total[fault.kind] = total.get(fault.kind, 0) + fault.count
        return total

    @property
    def fingerprint(self) -> str:
        """sha256 over the shards' contents and order, whatever their folder is called."""
        lines = [f"{shard.sha256} {shard.size} {shard.num_samples}\n" for shard in self.shards]
        return hashlib.sha256("".join(lines).encode()).hexdigest()

    def read(self, sample: int) -> tuple[bytes, str]:
        """The encoded image and the caption of one sample, 0 <= sample < num_samples.

        Raises DataError when the shard is gone, shorter than it was, or the caption is no UTF-8.
        """
        if not 0 <= sample < self.num_samples:
            raise IndexError(f"sample {sample} of {self.num_samples}")
        shard = self.shards[self.shard_id[sample]]
        file = self._open.get(shard.path, shard.size)
        image = _read_at(file, int(self.image_offset[sample]), int(self.image_length[sample]))
        text = _read_at(file, int(self.text_offset[sample]), int(self.text_length[sample]))
        try:
            return image, text.decode("utf-8")
        except UnicodeDecodeError as error:
            raise DataError(f"the caption of {self.describe(sample)} is not UTF-8") from error

    def describe(self, sample: int) -> str:
        """Shard and image member of one sample, for messages."""
        shard = self.shards[self.shard_id[sample]]
        file = self._open.get(shard.path, shard.size)
        member = _text(_read_at(file, int(self.image_offset[sample]) - _BLOCK, _NAME_BYTES))
        return f"{shard.path}: {member}"


def _read_at(file: _OpenShard, offset: int, length: int) -> bytes:
    data = os.pread(file.fd, length, offset)
    if len(data) != length:
        raise DataError(f"shard {file.path} gave {len(data)} of {length} bytes at {offset}")
    return data


# ------------------------------------------------------------------------------- names of shards

_RANGE = re.compile(r"(-?\d+|[A-Za-z])\.\.(-?\d+|[A-Za-z])(?:\.\.(-?\d+))?")


def expand_shards(pattern: str, *, root: Path | None = None) -> list[str]:
    """All shard paths of a pattern like ``a/{000..575}.tar::b/{x,y}.tar``, as the shell expands it.

    Relative paths are taken from `root`. Only local files can be indexed; `pipe:` (which the
    webdataset library runs as a shell command) and other schemes raise DataError.
    """
    paths = []
    for part in pattern.split("::"):
        if not part:
            raise DataError(f"the shard list {pattern!r} has an empty part; expected a::b")
        _refuse_scheme(part)
        for path in _expand_braces(part):
            path = os.path.expanduser(path)
            paths.append(os.path.join(root, path) if root is not None else path)
            if len(paths) > MAX_SHARDS:
                raise DataError(f"the shard list {pattern!r} gives more than {MAX_SHARDS:,} names")
    return paths


def _refuse_scheme(part: str) -> None:
    scheme = re.match(r"\s*([A-Za-z][A-Za-z0-9+.-]*):", part)
    if scheme is None:
        return
    if scheme[1].lower() == "pipe":
        raise DataError(
            f"{part!r} would run a shell command for every shard, which is refused; "
            "copy the shards to a local or mounted folder and give its path"
        )
    raise DataError(
        f"{part!r}: shards are read from local or mounted folders only, not from "
        f"{scheme[1]}:; give a plain path"
    )


def _expand_braces(text: str) -> Iterator[str]:
    """{a,b}, {01..12}, {a..e}, {0..10..2}, nested; braces that are neither stay as they are."""
    group = _first_group(text)
    if group is None:
        yield text
        return
    start, end, options = group
    for option in options:
        for rest in _expand_braces(text[end:]):
            yield text[:start] + option + rest


def _first_group(text: str) -> tuple[int, int, Iterable[str]] | None:
    """(start, end, expanded options) of the first outermost pair of braces that means something."""
    for start in (match.start() for match in re.finditer(r"\{", text)):
        depth, commas = 0, []
        for place in range(start, len(text)):
            char = text[place]
            depth += (char == "{") - (char == "}")
            if char == "," and depth == 1:
                commas.append(place)
            if depth == 0:
                inner = text[start + 1 : place]
                if commas:
                    edges = [start, *commas, place]
                    parts = [text[a + 1 : b] for a, b in zip(edges, edges[1:], strict=False)]
                    return start, place + 1, (o for part in parts for o in _expand_braces(part))
                numbers = _expand_range(inner)
                if numbers is not None:
                    return start, place + 1, numbers
                break
    return None


def _expand_range(text: str) -> Iterable[str] | None:
    match = _RANGE.fullmatch(text)
    if match is None:
        return None
    first, last, step = match.groups()
    if first.lstrip("-").isdigit() != last.lstrip("-").isdigit():
        return None
    stride = abs(int(step or 1)) or 1
    if not first.lstrip("-").isdigit():
        return (chr(code) for code in _inclusive(ord(first), ord(last), stride))
    padded = any(len(n.lstrip("-")) > 1 and n.lstrip("-")[0] == "0" for n in (first, last))
    width = max(len(first), len(last)) if padded else 0
    return (f"{number:0{width}d}" for number in _inclusive(int(first), int(last), stride))


def _inclusive(first: int, last: int, stride: int) -> range:
    return range(first, last + 1, stride) if first <= last else range(first, last - 1, -stride)


# --------------------------------------------------------------------------------- writing shards


def write_shard(path: Path, samples: Iterable[Sample]) -> int:
    """Write one shard by rename and return the number of samples in it.

    The same samples give the same bytes: no times, owners or modes of this machine are stored.
    """
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    count = 0
    try:
        with tarfile.open(temporary, "w", format=tarfile.USTAR_FORMAT) as tar:
            for sample in samples:
                _add_member(tar, f"{sample.key}.{sample.image_type}", sample.image)
                _add_member(tar, f"{sample.key}.{CAPTION_TYPE}", sample.caption.encode("utf-8"))
                count += 1
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    return count


def _add_member(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    info = tarfile.TarInfo(name)  # mtime 0, uid 0, gid 0, mode 0644, no owner names
    info.size = len(data)
    tar.addfile(info, io.BytesIO(data))


# -------------------------------------------------------------------------------- scanning a shard


class _Gatherer:
    """Puts neighbouring members together into samples, and counts what cannot be used."""

    def __init__(self) -> None:
        self.rows: list[tuple[int, int, int, int]] = []
        self.faults: dict[str, tuple[int, tuple[str, ...]]] = {}
        self._seen: set[str] = set()
        self._key: str | None = None
        self._parts: dict[str, tuple[int, int]] = {}

    def add(self, name: str, offset: int, length: int) -> None:
        folder, slash, base = name.rpartition("/")
        stem, dot, extension = base.partition(".")
        if not dot or not stem or _META.match(name):
            return
        key, extension = folder + slash + stem, extension.lower()
        if key != self._key or extension in self._parts:
            self.finish_sample()
            self._key = key
        self._parts[extension] = (offset, length)

    def finish_sample(self, *, readable_to: int | None = None) -> None:
        """Close the current sample; what lies beyond byte `readable_to` is not there."""
        key, parts = self._key, self._parts
        self._key, self._parts = None, {}
        if key is None:
            return
        image = next((parts[kind] for kind in IMAGE_TYPES if kind in parts), (0, 0))
        text = parts.get(CAPTION_TYPE, (0, 0))
        if readable_to is not None and (
            not image[1] or not text[1] or max(sum(image), sum(text)) > readable_to
        ):
            return  # cut off by the end of the file, which the caller reports
        if key in self._seen:
            self.report("duplicate_key", key)
        elif not image[1]:
            self.report("missing_image", key)
        elif not text[1]:
            self.report("missing_caption", key)
        else:
            self.rows.append((*image, *text))
        self._seen.add(key)

    def report(self, kind: str, what: str) -> None:
        count, examples = self.faults.get(kind, (0, ()))
        self.faults[kind] = count + 1, examples + ((what,) if len(examples) < _EXAMPLES else ())


class _Window:
    """A file read once from start to end, hashed on the way, of which the latest part is kept."""

    def __init__(self, file: io.RawIOBase) -> None:
        self._file = file
        self._digest = hashlib.sha256()
        self._kept = b""
        self.end = 0  # bytes read so far

    def bytes_at(self, offset: int, length: int) -> bytes:
        """`length` bytes from `offset` on, fewer at the end of the file. Offsets never go back."""
        while offset + length > self.end:
            kept = self._kept[offset - self.end :] if offset < self.end else b""
            if not self._advance(kept):
                break
        start = len(self._kept) - (self.end - offset)
        return self._kept[start : start + length] if offset < self.end else b""

    def finish(self) -> str:
        """Read the rest and return the sha256 of the whole file."""
        while self._advance(b""):
            pass
        return self._digest.hexdigest()

    def _advance(self, kept: bytes) -> bool:
        data = self._file.read(_CHUNK) or b""
        self._digest.update(data)
        self._kept = kept + data
        self.end += len(data)
        return bool(data)


def _scan_shard(path: str) -> _Scan:
    """Read one shard from the first byte to the last."""
    gatherer = _Gatherer()
    before = os.stat(path)
    with open(path, "rb", buffering=0) as file:
        window = _Window(file)
        _walk_members(window, gatherer)
        sha256 = window.finish()
    after = os.stat(path)
    if (before.st_size, before.st_mtime_ns) != (after.st_size, after.st_mtime_ns):
        raise DataError(f"shard {path} changed while it was read; wait until it is written")
    rows = np.array(gatherer.rows, dtype=np.int64).reshape(-1, 4)
    return _Scan(
        size=window.end,
        sha256=sha256,
        image_offset=rows[:, 0].copy(),
        image_length=rows[:, 1].astype(np.int32),
        text_offset=rows[:, 2].copy(),
        text_length=rows[:, 3].astype(np.int32),
        faults=gatherer.faults,
    )


def _walk_members(window: _Window, gatherer: _Gatherer) -> None:
    """Give every plain file of the archive to the gatherer; report it when reading ends early.

    Headers are decoded here because `tarfile` takes several times as long. Pax headers are common:
    webdataset's own writer puts one before every member, for the fraction of its time stamp.
    """
    header = 0  # offset of the next header
    said_name, said_length = None, None  # what an extension header says about the next member
    while True:
        block = window.bytes_at(header, _BLOCK)
        if len(block) < _BLOCK:
            size = window.end
            gatherer.finish_sample(readable_to=size)
            kind = "no_end_marker" if header == size else "truncated"
            gatherer.report(kind if size else "unreadable_shard", f"byte {size}")
            return
        if block[0] == 0 and not any(block):
            gatherer.finish_sample()
            return
        member = _read_header(block)
        if member is None:
            gatherer.finish_sample()
            gatherer.report("damaged_header" if header else "unreadable_shard", f"byte {header}")
            return
        flag, name, length = member
        body = header + _BLOCK
        if flag in "xL":
            said = window.bytes_at(body, min(length, _CHUNK))
            if flag == "L":
                said_name = _text(said)
            else:
                said_name, said_length = _read_pax(said, name=said_name)
        elif flag in "0\x007":
            name, length = said_name or name, length if said_length is None else said_length
            said_name, said_length = None, None
            if length > MAX_MEMBER_BYTES:
                gatherer.finish_sample()
                gatherer.report("unsupported_member", name)
                return
            if not name.endswith("/"):
                gatherer.add(name, body, length)
        elif flag in "123456":  # links, devices and folders have no data
            length, said_name, said_length = 0, None, None
        elif flag not in "gK":
            gatherer.finish_sample()
            gatherer.report("unsupported_member", name)
            return
        header = body + -(-length // _BLOCK) * _BLOCK


def _read_header(block: bytes) -> tuple[str, str, int] | None:
    """(type flag, name, length) of a member; None when the block is no header."""
    try:
        checksum = int(block[148:156].strip(b" \0"), 8)
        if sum(block) - sum(block[148:156]) + 8 * ord(" ") != checksum:
            return None
        if block[124] & 0x80:  # a length of 8 GiB or more is binary
            length = int.from_bytes(block[125:136], "big")
        else:
            length = int(block[124:136].strip(b" \0") or b"0", 8)
    except ValueError:
        return None
    name = _text(block[:_NAME_BYTES])
    if block[345]:
        name = f"{_text(block[345:500])}/{name}"
    return chr(block[156]), name, length


def _read_pax(data: bytes, *, name: str | None) -> tuple[str | None, int | None]:
    """The name (or the one given) and the length that a pax header states for the next member."""
    length = None
    if b" path=" in data or b" size=" in data:
        start = 0
        while match := _PAX_RECORD.match(data, start):
            end = start + int(match[1])
            value = data[match.end() : end - 1].decode("utf-8", "surrogateescape")
            if match[2] == b"path":
                name = value
            elif match[2] == b"size" and value.isdigit():
                length = int(value)
            if end <= match.end():
                break
            start = end
    return name, length


def _text(data: bytes) -> str:
    return data.partition(b"\0")[0].decode("utf-8", "surrogateescape")


# ----------------------------------------------------------------------------- indexing and caching


def index_shards(
    pattern: str,
    *,
    cache: Path | None,
    root: Path | None = None,
    on_shard: Callable[[int, int], None] | None = None,
) -> ShardIndex:
    """The index over all shards of `pattern` (relative to `root`, see `expand_shards`).

    Each shard is read once; what was found is kept in the folder `cache` and used until the
    shard's path, size or modification time changes (None: nothing is kept). Callers that share a
    cache wait for one another, so that the shards are read once. `on_shard(done, total)` is called
    after each shard. Faults (see FAULTS) are counted, not raised; DataError is raised for a
    pattern that is refused, a shard that is being written, or when no sample is left.
    """
    paths = [os.path.abspath(path) for path in expand_shards(pattern, root=root)]
    if cache is None:
        return _join(pattern, paths, _obtain(paths, None, on_shard))
    cache.mkdir(parents=True, exist_ok=True)
    scans = _obtain_cached(paths, cache)
    if scans is None:
        with FileLock(cache / "index.lock"):
            scans = _obtain(paths, cache, on_shard)
    return _join(pattern, paths, scans)


def _obtain_cached(paths: list[str], cache: Path) -> list[_Scan] | None:
    """All scans from the cache, without its lock; None as soon as one is not there."""
    scans = []
    for path in paths:
        scan = _load_scan(_entry(cache, path)) if os.path.exists(path) else None
        if scan is None:
            return None
        scans.append(scan)
    return scans


def _obtain(
    paths: list[str], cache: Path | None, on_shard: Callable[[int, int], None] | None
) -> list[_Scan]:
    """Scans of all shards. Threads are enough: reading and hashing let other threads run."""
    scans = []
    with ThreadPoolExecutor(min(8, len(os.sched_getaffinity(0)), len(paths))) as pool:
        for scan in pool.map(lambda path: _obtain_one(path, cache), paths):
            scans.append(scan)
            if on_shard is not None:
                on_shard(len(scans), len(paths))
    return scans


def _obtain_one(path: str, cache: Path | None) -> _Scan:
    try:
        entry = None if cache is None else _entry(cache, path)
        scan = None if entry is None else _load_scan(entry)
        if scan is None:
            scan = _scan_shard(path)
            if entry is not None:
                _save_scan(entry, scan)
        return scan
    except FileNotFoundError:
        return _empty_scan("missing_shard")
    except (PermissionError, IsADirectoryError) as error:
        return _empty_scan("unreadable_shard", str(error.strerror))


def _empty_scan(kind: str, *examples: str) -> _Scan:
    offsets, lengths = np.zeros(0, np.int64), np.zeros(0, np.int32)
    return _Scan(0, "", offsets, lengths, offsets, lengths, {kind: (1, examples)})


def _entry(cache: Path, path: str) -> Path:
    """Where the scan of this very file is kept."""
    facts = os.stat(path)
    identity = f"{FORMAT}\0{path}\0{facts.st_size}\0{facts.st_mtime_ns}"
    digest = hashlib.sha256(identity.encode("utf-8", "surrogateescape")).hexdigest()
    return cache / f"{Path(path).stem}-{digest[:24]}.npz"


_ARRAYS = ("image_offset", "image_length", "text_offset", "text_length")


def _save_scan(entry: Path, scan: _Scan) -> None:
    facts = json.dumps({"size": scan.size, "sha256": scan.sha256, "faults": scan.faults})
    temporary = entry.with_name(f".{entry.name}.{secrets.token_hex(4)}.tmp")
    try:
        with open(temporary, "wb") as file:
            np.savez(
                file,
                facts=np.frombuffer(facts.encode(), np.uint8),
                **{name: getattr(scan, name) for name in _ARRAYS},
            )
        os.replace(temporary, entry)
    finally:
        temporary.unlink(missing_ok=True)


def _load_scan(entry: Path) -> _Scan | None:
    """A kept scan; None when there is none, or the file is damaged (it is then made again)."""
    try:
        with np.load(entry) as arrays:
            facts = json.loads(arrays["facts"].tobytes())
            return _Scan(
                size=facts["size"],
                sha256=facts["sha256"],
                faults={kind: (n, tuple(names)) for kind, (n, names) in facts["faults"].items()},
                **{name: arrays[name] for name in _ARRAYS},
            )
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        return None


def _join(pattern: str, paths: list[str], scans: list[_Scan]) -> ShardIndex:
    counts = [len(scan.image_offset) for scan in scans]
    faults = tuple(
        Fault(shard=path, kind=kind, count=count, examples=examples)
        for path, scan in zip(paths, scans, strict=True)
        for kind, (count, examples) in scan.faults.items()
    )
    if not sum(counts):
        shown = "".join(f"\n  {fault}: {FAULTS[fault.kind]}" for fault in faults[:5])
        more = f"\n  and {len(faults) - 5} more" if len(faults) > 5 else ""
        raise DataError(
            f"no usable sample in the {len(paths)} shards of {pattern!r}; shards are plain "
            f"(uncompressed) tar files of KEY.jpg + KEY.txt{shown}{more}"
        )
    return ShardIndex(
        shards=tuple(
            Shard(path=path, size=scan.size, sha256=scan.sha256, num_samples=count)
            for path, scan, count in zip(paths, scans, counts, strict=True)
        ),
        shard_id=np.repeat(np.arange(len(scans), dtype=np.int32), counts),
        image_offset=np.concatenate([scan.image_offset for scan in scans]),
        image_length=np.concatenate([scan.image_length for scan in scans]),
        text_offset=np.concatenate([scan.text_offset for scan in scans]),
        text_length=np.concatenate([scan.text_length for scan in scans]),
        faults=faults,
    )
