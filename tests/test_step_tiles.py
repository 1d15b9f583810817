"""Values in tiles: views only move places, and a part of a tile is asked for by a cut."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.fx import Graph

from hwbp_compile.errors import CannotRewrite
from hwbp_compile.recurrent.step_tiles import (
    COLUMNS,
    MOST_TILES,
    Memory,
    NeedsCut,
    Run,
    Tile,
    Value,
    aligned,
    checked,
    lane_of,
    lines_along,
    one_row,
    runs_of,
    tile_places,
)

NODE = Graph().placeholder("x")
TILES = [Tile("a", 4, NODE, 0), Tile("b", 6, NODE, 4), Tile("c", 1, NODE, 10)]
LINE = torch.cat([tile_places(i, t.width) for i, t in enumerate(TILES)])


def test_whole_tiles_are_runs() -> None:
    runs = [checked(run, TILES) for run in runs_of(Value(LINE), LINE)]
    assert [(r.tile, r.width) for r in runs] == [(0, 4), (1, 6), (2, 1)]


@pytest.mark.parametrize(("part", "place"), [(slice(0, 2), 2), (slice(1, 4), 1), (slice(4, 7), 7)])
def test_a_part_of_a_tile_needs_a_cut(part: slice, place: int) -> None:
    with pytest.raises(NeedsCut) as needed:
        _ = [checked(run, TILES) for run in runs_of(Value(LINE), LINE[part])]
    assert (needed.value.node, needed.value.place) == (NODE, place)


def test_one_element_for_many() -> None:
    (run,) = runs_of(Value(LINE), LINE[10:].expand(5))
    assert checked(run, TILES) == Run(5, 2, 2 * COLUMNS, 0)
    with pytest.raises(NeedsCut):
        _ = [checked(r, TILES) for r in runs_of(Value(LINE), LINE[:1].expand(5))]


@given(
    sizes=st.lists(st.integers(1, 5), min_size=1, max_size=3),
    step=st.integers(1, 2),
    permuted=st.booleans(),
    repeated=st.booleans(),
)
def test_runs_of_memory_hold_its_places(sizes: list[int], step: int, permuted: bool, repeated: bool) -> None:
    places = torch.arange(torch.Size(sizes).numel()).view(sizes)[..., ::step]
    places = places.permute(*reversed(range(places.dim()))) if permuted else places
    places = places.unsqueeze(0).expand(3, *places.shape) if repeated else places
    value = Value(places, Memory("x", True, True))
    for lane in range(places.dim()):
        for index, line in lines_along(places, lane):
            found = [r.first + i * r.step for r in runs_of(value, line) for i in range(r.width)]
            assert found == line.tolist() == places.movedim(lane, -1)[index].tolist()


@given(
    cuts=st.sets(st.integers(1, 19)), widest=st.integers(1, 8), split=st.integers(1, 19), tile=st.booleans()
)
def test_aligned_pieces(cuts: set[int], widest: int, split: int, tile: bool) -> None:
    """Of memory at any place; of tiles at their ends, or a cut is asked for."""
    memory = [Run(split, None, 0, 1), Run(20 - split, None, 100, 2)]
    tiles = [Tile("a", 12, NODE, 0), Tile("b", 8, NODE, 12)]
    whole = [Run(12, 0, 0, 1), Run(8, 1, COLUMNS, 1)]
    lines = [memory, whole] if tile else [memory]
    ends = {0, split, 20, *cuts, *({12} if tile else ())}
    for a, b in pairwise(sorted(ends)):
        ends.update(range(a + widest, b, widest))
    wanted = list(pairwise(sorted(ends)))
    if tile and ends != {0, 12, 20}:
        with pytest.raises(NeedsCut) as needed:
            list(aligned(lines, tiles, widest, cuts))
        assert needed.value.place in ends - {0, 12, 20}
        return
    found = list(aligned(lines, tiles, widest, cuts))
    assert [(start, start + pieces[0].width) for start, pieces in found] == wanted
    for start, (piece, *_) in found:
        expected = [i if i < split else 100 + 2 * (i - split) for i in range(start, start + piece.width)]
        assert [piece.first + i * piece.step for i in range(piece.width)] == expected


def test_the_lane_is_where_neighbours_are() -> None:
    places = torch.arange(12).view(3, 4)
    assert lane_of([Value(places)], (3, 4)) == 1
    assert lane_of([Value(places.t())], (4, 3)) == 0
    assert lane_of([Value(torch.zeros(1, 1, dtype=torch.int64)), Value(places)], (3, 4)) == 1


def test_too_many_pieces() -> None:
    with pytest.raises(CannotRewrite, match="too many pieces"):
        list(lines_along(torch.zeros(MOST_TILES + 1, 2), 1))


def test_rows_become_one() -> None:
    assert one_row(([7, -1, (7, 3)], 7, True, 2.0), 7) == ([1, -1, (1, 3)], 1, True, 2.0)
