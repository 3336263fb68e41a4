"""An endless stream of shuffled blocks of one source, read in pieces, with a position after every block.

An epoch's ids, in the order of its shards, are cut into windows of a few MiB, and windows into blocks. A hash of (seed,
epoch, window) shuffles a window's blocks. A position is the window's place in the source and the number of blocks taken
from it, so continuing reads one window again and nothing before it.
"""

from __future__ import annotations

import zlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np

from arb_kernels.random_bits import random_bits, stream_key

from .document_readers import TEXT_COLUMN, read_pieces

WINDOW_IDS = 1 << 23
# how many blocks a reader may be ahead of the position that is asked for
LOOK_BACK = 1 << 18

# JSON: the place of a piece in an epoch; None: the beginning
Place = list | dict | None
Pieces = Callable[[int, Place], Iterator[tuple[Place, np.ndarray]]]
Windows = Iterator[tuple[Place, int, np.ndarray]]


def shuffled(count: int, *key: int) -> np.ndarray:
    """int64 (count,): 0..count - 1 in an order determined by the key."""
    return np.argsort(random_bits(stream_key(*key), 1, count)[0].numpy(), kind="stable")


def read_windows(pieces: Iterable[tuple[Place, np.ndarray]], ctx: int, most: int, skip: int) -> Windows:
    """(place, skip, blocks uint16 (n, ctx)), n = `most` but for the last; a remainder shorter than a block is left out.

    The window begins `skip` ids after the start of the piece at `place`. The next window reuses its memory.
    """
    window, filled = np.empty(most * ctx, dtype=np.uint16), 0
    for here, ids in pieces:
        taken, skip = skip, 0
        while taken < len(ids):
            if not filled:
                place, behind = here, taken
            count = min(len(ids) - taken, len(window) - filled)
            window[filled : filled + count] = ids[taken : taken + count]
            filled, taken = filled + count, taken + count
            if filled == len(window):
                yield place, behind, window.reshape(-1, ctx)
                filled = 0
    if whole := filled // ctx * ctx:
        yield place, behind, window[:whole].reshape(-1, ctx)


class FileShards:
    """Pieces of the files, each from its own cursor, in an order determined by seed and epoch. Raises ValueError naming
    a file that is missing or whose size has changed.
    """

    def __init__(self, files: Sequence[tuple[Path, int]], seed: int, text_column: str = TEXT_COLUMN):
        self.files, self.seed, self.text_column = files, seed, text_column
        self.sizes = {path: path.stat().st_size for path, _ in files}
        names = "".join(f"{path.name}\0{self.sizes[path]}\0{start}\n" for path, start in files)
        self.identity = f"{len(files)} files of {text_column!r}, {zlib.crc32(names.encode()):08x}"

    def __call__(self, epoch: int, place: Place) -> Iterator[tuple[Place, np.ndarray]]:
        first, cursor = place or (0, None)
        order = shuffled(len(self.files), self.seed, epoch)
        for number in range(first, len(order)):
            path, start = self.files[order[number]]
            self._check_size(path)
            for here, ids in read_pieces(path, self.text_column, start if cursor is None else cursor):
                yield [number, here], ids
            self._check_size(path)
            cursor = None

    def _check_size(self, path: Path) -> None:
        if path.exists() and path.stat().st_size != self.sizes[path]:
            raise ValueError(
                f"data={str(path)!r} has changed during training: {path.stat().st_size:,} bytes, {self.sizes[path]:,}"
                " at the start"
            )


class WindowedBlocks:
    """An endless stream of blocks uint16 (ctx,), from the loaded position or the beginning.

    pieces: (epoch, place) -> (place, ids) from that place on, the same ids each time. A block is valid until the next
    one is read.
    """

    def __init__(self, pieces: Pieces, ctx: int, seed: int, identity: str, window_ids: int = WINDOW_IDS):
        self.pieces, self.ctx, self.seed = pieces, ctx, seed
        self.most = max(window_ids // ctx, 1)
        self.identity = f"{identity}, windows of {self.most} x {ctx}"
        self.load_state_dict({"epoch": 0, "window": 0, "place": None, "skip": 0, "taken": 0})

    def load_state_dict(self, state: dict) -> None:
        """Continue from there at the next iteration."""
        position = {key: state[key] for key in ("epoch", "window", "place", "skip")}
        self._loaded = (-state["taken"], position)
        self._windows = deque([self._loaded])  # (blocks of this iteration before a window, where it begins)

    def state_dict(self, blocks: int) -> dict:
        """The position, as JSON, after the first `blocks` blocks of the latest iteration."""
        first, position = next(item for item in reversed(self._windows) if item[0] <= blocks)
        return {**position, "taken": blocks - first}

    def __iter__(self) -> Iterator[np.ndarray]:
        self._windows = deque([self._loaded])
        return self._run(*self._loaded)

    def _run(self, first: int, position: dict) -> Iterator[np.ndarray]:
        epoch, number, place, skip = position.values()
        while True:
            empty = True
            for here, behind, blocks in read_windows(self.pieces(epoch, place), self.ctx, self.most, skip):
                empty = False
                self._remember(first, {"epoch": epoch, "window": number, "place": here, "skip": behind})
                for index in shuffled(len(blocks), self.seed, epoch, number)[max(-first, 0) :]:
                    yield blocks[index]
                first, number = first + len(blocks), number + 1
            if empty:
                raise ValueError(f"data: {self.identity} has no complete block")
            epoch, number, place, skip = epoch + 1, 0, None, 0

    def _remember(self, first: int, position: dict) -> None:
        self._windows.append((first, position))
        while self._windows[1][0] <= first - LOOK_BACK:
            self._windows.popleft()
