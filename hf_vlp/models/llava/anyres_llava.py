"""Any-resolution geometry of LLaVA-NeXT: which grid an image is cut into, and how its tiles' features are joined.

Sizes are (height, width) as in the native format; the original code counts (width, height).
"""

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor
from transformers.image_processing_utils import select_best_resolution
from transformers.models.llava_next.modeling_llava_next import unpad_image

MergeType = Literal["spatial_unpad", "spatial", "flat"]
MERGE_TYPES = ("spatial_unpad", "spatial", "flat")
# Tiles beside the base image that LLaVA-NeXT's own grids have at most.
MAX_TILES = 4
_NEXT_GRIDS = [(1, 2), (2, 1), (2, 2), (3, 1), (1, 3)]


class TileError(ValueError):
    """Tiles that do not fit the grid: too many, too few, or a resolution that whole tiles do not make up."""


def grids(tile_size: int, max_tiles: int = MAX_TILES) -> list[list[int]]:
    """Resolutions (height, width) of an image cut into 2 to `max_tiles` tiles.

    Up to 4 tiles these are LLaVA-NeXT's own, in its order: 2 or 3 in a line, 4 in a square. With more, all grids of up
    to so many tiles.

    Raises:
        TileError: `max_tiles` is below 2.
    """
    if max_tiles < 2:
        raise TileError(
            f"max_tiles must be at least 2, not {max_tiles}; for one tile an image use LLaVA 1.5 (`llava`)"
        )
    shapes = [shape for shape in _NEXT_GRIDS if shape[0] * shape[1] <= max_tiles]
    if max_tiles > MAX_TILES:
        sides = range(1, max_tiles + 1)
        every = [(rows, columns) for rows in sides for columns in sides if 2 <= rows * columns <= max_tiles]
        shapes += [shape for shape in every if shape not in shapes]
    return [[rows * tile_size, columns * tile_size] for rows, columns in shapes]


def check_grids(pinpoints: Sequence[Sequence[int]], tile_size: int, max_tiles: int | None = None) -> None:
    """Refuses resolutions that tiles cannot make up.

    Args:
        pinpoints: (height, width) resolutions.
        tile_size: side of a tile in pixels, the vision tower's image size.
        max_tiles: most tiles that an image may take, the base image not counted; None for any number.

    Raises:
        TileError: the message names the resolution.
    """
    if not pinpoints:
        raise TileError("image_grid_pinpoints are empty; give at least one (height, width)")
    for height, width in pinpoints:
        if height % tile_size or width % tile_size or min(height, width) < tile_size:
            raise TileError(
                f"the resolution {height} x {width} of image_grid_pinpoints is not made up of whole tiles of "
                f"{tile_size} pixels; use multiples of {tile_size}"
            )
        tiles = (height // tile_size) * (width // tile_size)
        if max_tiles is not None and tiles > max_tiles:
            raise TileError(
                f"the resolution {height} x {width} of image_grid_pinpoints takes {tiles} tiles of {tile_size} "
                f"pixels, over the maximum of {max_tiles}; raise max_tiles or leave the resolution out"
            )


def grid_shape(size: Sequence[int], pinpoints: Sequence[Sequence[int]], tile_size: int) -> tuple[int, int]:
    """Rows and columns of tiles for an image of `size` (height, width)."""
    height, width = select_best_resolution(tuple(int(side) for side in size), [list(p) for p in pinpoints])
    return height // tile_size, width // tile_size


def merge_tiles(
    features: Tensor,
    size: Sequence[int],
    grid: tuple[int, int],
    newline: Tensor | None,
    merge_type: MergeType = "spatial_unpad",
) -> Tensor:
    """Joins the features of an image's tiles into one sequence (LLaVA-NeXT's `mm_patch_merge_type`).

    Args:
        features: (1 + tiles, patches, width), the base image first; patches make up a square.
        size: (height, width) of the original image.
        grid: rows and columns of tiles.
        newline: (width,) the newline embedding, which ends each row of the joined map; None for none.
        merge_type: "spatial_unpad" joins the tiles to one map, cuts off what the letterbox added and ends the rows;
            "spatial" only joins them, "flat" leaves them one behind the other.

    Returns:
        (tokens, width), those of the base image first.

    Raises:
        TileError: the number of tiles is not that of the grid.
    """
    base, tiles = features[0], features[1:]
    if len(tiles) == 0:
        ended = merge_type == "spatial_unpad" and newline is not None
        return torch.cat([base, newline[None].to(base)]) if ended else base
    rows, columns = grid
    if len(tiles) != rows * columns:
        raise TileError(
            f"an image of {tuple(int(s) for s in size)} pixels is cut into {rows} x {columns} tiles, but "
            f"{len(tiles)} tiles are given; processor and model have different image_grid_pinpoints"
        )
    if merge_type == "flat":
        return features.flatten(0, 1)
    side = round(base.shape[0] ** 0.5)
    if side * side != base.shape[0]:
        raise TileError(f"a tile has {base.shape[0]} features, which make up no square map")
    joined = tiles.unflatten(0, (rows, columns)).unflatten(2, (side, side))  # (rows, columns, side, side, width)
    joined = joined.permute(4, 0, 2, 1, 3).flatten(3, 4).flatten(1, 2)  # (width, rows * side, columns * side)
    if merge_type == "spatial_unpad":
        # Differs from the original: sizes are rounded to 7 digits before they are truncated, as in the native format,
        # so that a product like 5.9999999 keeps its sixth row.
        joined = unpad_image(joined, [int(side) for side in size])
        if newline is not None:
            ends = newline[:, None, None].expand(*joined.shape[:-1], 1).to(joined)
            joined = torch.cat([joined, ends], dim=-1)
    return torch.cat([base, joined.flatten(1).t()])


__all__ = ["MAX_TILES", "MERGE_TYPES", "MergeType", "TileError", "check_grids", "grid_shape", "grids", "merge_tiles"]
