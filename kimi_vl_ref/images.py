"""Pictures in, patches and geometry out: resize, pad, normalise, cut; and the way back from a token to its pixels.

Every number comes from `preprocessor_config.json`; the released class has other defaults, which are wrong for its own
checkpoints. Three deliberate differences from the released processor, none of which touches an RGB file: colours are
converted before resizing instead of after it, transparency is laid on white instead of dropped, and the EXIF
orientation is applied. Sizes and points are (width, height) and (x, y) as in Pillow; grids are (rows, columns) as in
tensors.
"""

from __future__ import annotations

import base64
import binascii
import json
import math
import threading
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
from einops import rearrange
from PIL import Image, ImageOps
from torch import Tensor

from .told import short, shown

MAX_PIXELS = 50_000_000  # refused from the header, before anything is decoded; the model sees about 3 million at most
MAX_GRID_SIDE = 512  # a padded side of this many patches is refused, as in the released processor
PROCESSOR_TYPE = "KimiVLImageProcessor"
LARGEST = {"patch_size": 1024, "merge_kernel_size": 8, "in_token_limit": 1 << 24}  # far above any release
# What Pillow may decode. Of its other formats, one starts another program (Ghostscript, for EPS), and none is a photograph.
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "DIB", "TIFF", "ICO", "PPM", "JPEG2000", "AVIF")

_DECODING = threading.Lock()  # silencing Pillow's warnings changes process-wide state; one thread at a time

ImageSource = str | Path | bytes | Image.Image | np.ndarray


class ImageError(ValueError):
    """A picture, or a description of how to prepare pictures, that cannot be used."""


@dataclass(frozen=True)
class PatchGrid:
    """Where the patches and visual tokens of one picture lie. Points and boxes are in pixels of the original picture.

    Pixel i covers [i, i + 1); boxes are (x0, y0, x1, y1) floats, clipped to the picture. Patches and tokens are
    numbered row by row; a token stands for `merge` x `merge` neighbouring patches.
    """

    original: tuple[int, int]  # width, height in pixels
    resized: tuple[int, int]  # width, height in pixels; the original size unless the picture was too large
    grid: tuple[int, int]  # rows, columns of patches, padding included
    patch_size: int
    merge: int
    offset: tuple[int, int] = (0, 0)  # pixels of the resized picture cropped off at the left and top

    @property
    def padded(self) -> tuple[int, int]:
        """Width and height of what is cut into patches."""
        return self.grid[1] * self.patch_size, self.grid[0] * self.patch_size

    @property
    def patch_count(self) -> int:
        return self.grid[0] * self.grid[1]

    @property
    def token_grid(self) -> tuple[int, int]:
        """Rows, columns of visual tokens."""
        return self.grid[0] // self.merge, self.grid[1] // self.merge

    @property
    def token_count(self) -> int:
        return self.token_grid[0] * self.token_grid[1]

    def token_of_patch(self, patch: int) -> int:
        row, column = divmod(self._checked(patch, self.patch_count, "patch"), self.grid[1])
        return row // self.merge * self.token_grid[1] + column // self.merge

    def patches_of_token(self, token: int) -> list[int]:
        """The merged patches, row by row: the order in which the projector lays them side by side."""
        row, column = divmod(self._checked(token, self.token_count, "token"), self.token_grid[1])
        rows = range(row * self.merge, (row + 1) * self.merge)
        columns = range(column * self.merge, (column + 1) * self.merge)
        return [r * self.grid[1] + c for r in rows for c in columns]

    def patch_box(self, patch: int) -> tuple[float, float, float, float] | None:
        """The part of the picture under a patch; None if the patch is all padding."""
        row, column = divmod(self._checked(patch, self.patch_count, "patch"), self.grid[1])
        return self._box(row, column, self.patch_size)

    def token_box(self, token: int) -> tuple[float, float, float, float] | None:
        """The part of the picture under a visual token; None if the token is all padding."""
        row, column = divmod(self._checked(token, self.token_count, "token"), self.token_grid[1])
        return self._box(row, column, self.patch_size * self.merge)

    def patch_at(self, x: float, y: float) -> int:
        """The patch over a point of the picture. Raises ValueError for a point that no patch covers."""
        (width, height), (rows, columns) = self.original, self.grid
        if not (0 <= x < width and 0 <= y < height):
            raise ValueError(f"the point ({x}, {y}) is outside the picture of {width} x {height} pixels")
        column = math.floor((x * self.resized[0] / width - self.offset[0]) / self.patch_size)
        row = math.floor((y * self.resized[1] / height - self.offset[1]) / self.patch_size)
        if not (0 <= row < rows and 0 <= column < columns):
            raise ValueError(f"the point ({x}, {y}) was cropped off; pad_input=true keeps the whole picture")
        return row * columns + column

    def token_at(self, x: float, y: float) -> int:
        """The visual token over a point of the picture. Raises ValueError for a point that no token covers."""
        return self.token_of_patch(self.patch_at(x, y))

    def token_heat(self, values: Any) -> Any:
        """One value a token, (..., tokens) tensor or array -> (..., rows, columns)."""
        return self._as_grid(values, self.token_count, self.token_grid, "visual tokens")

    def patch_heat(self, values: Any) -> Any:
        """One value a patch, (..., patches) tensor or array -> (..., rows, columns)."""
        return self._as_grid(values, self.patch_count, self.grid, "patches")

    def _box(self, row: int, column: int, side: int) -> tuple[float, float, float, float] | None:
        x0, x1 = (self._span(at * side, axis=0) for at in (column, column + 1))
        y0, y1 = (self._span(at * side, axis=1) for at in (row, row + 1))
        return (x0, y0, x1, y1) if x0 < x1 and y0 < y1 else None

    def _span(self, at: int, axis: int) -> float:
        inside = min(at + self.offset[axis], self.resized[axis])
        return inside * self.original[axis] / self.resized[axis]

    def _checked(self, index: int, count: int, what: str) -> int:
        if not 0 <= index < count:
            raise ValueError(f"{what} {index} does not exist; they are numbered 0 to {count - 1}")
        return index

    def _as_grid(self, values: Any, count: int, grid: tuple[int, int], what: str) -> Any:
        values = np.asarray(values) if isinstance(values, list | tuple) else values
        if values.shape[-1] != count:
            raise ValueError(
                f"{values.shape[-1]} values do not fit a picture of {grid[0]} x {grid[1]} {what}; give one for each"
            )
        return values.reshape(*values.shape[:-1], *grid)


@dataclass(frozen=True)
class Picture:
    """A picture as it was given (RGB, at its own size) and how it was cut."""

    image: Image.Image
    grid: PatchGrid


@dataclass(frozen=True)
class ImageProcessor:
    """What `preprocessor_config.json` says: sizes in pixels, the limit in patches, mean and std a colour in [0, 1]."""

    patch_size: int
    merge_kernel_size: tuple[int, int]
    in_token_limit: int
    pad_input: bool
    image_mean: tuple[float, float, float]
    image_std: tuple[float, float, float]

    def __post_init__(self) -> None:
        if self.merge_kernel_size[0] != self.merge_kernel_size[1]:
            raise ImageError(
                f"merge_kernel_size={list(self.merge_kernel_size)} is not square; every Kimi-VL checkpoint has [2, 2]"
            )

    @classmethod
    def from_json(cls, path: str | Path) -> ImageProcessor:
        """Reads `preprocessor_config.json`. Raises ImageError naming the file and the key."""
        try:
            data = json.loads(Path(path).read_text(encoding="utf-8"))
        except OSError as error:
            reason = error.strerror or error
            raise ImageError(f"cannot read {path} ({reason}); a checkpoint folder needs this file") from error
        except (ValueError, RecursionError) as error:
            raise ImageError(f"{path} is not valid JSON ({short(error)}); fetch the file again") from error
        return cls.from_dict(data, source=str(path))

    @classmethod
    def from_dict(cls, data: Any, source: str = "preprocessor_config.json") -> ImageProcessor:
        """Keys that the algorithm does not use (`num_pooled_tokens`, ...) are ignored; no needed key is assumed."""
        if not isinstance(data, dict):
            raise ImageError(f"{source} does not hold a JSON object; fetch the file again")
        if data.get("image_processor_type") != PROCESSOR_TYPE:
            raise ImageError(
                f"{source}: image_processor_type={shown(data.get('image_processor_type'))} is not implemented; "
                f"a Kimi-VL checkpoint has {PROCESSOR_TYPE!r}"
            )
        read = _Keys(data, source)
        return cls(
            patch_size=read.count("patch_size"),
            merge_kernel_size=read.pair("merge_kernel_size"),
            in_token_limit=read.count("in_token_limit"),
            pad_input=read.switch("pad_input"),
            image_mean=read.colours("image_mean", "from 0 to 255", lambda v: 0 <= v <= 255),
            image_std=read.colours("image_std", "from 0.001 to 255", lambda v: 0.001 <= v <= 255),
        )

    def to_dict(self) -> dict[str, Any]:
        """The released layout of `preprocessor_config.json`."""
        return {
            "image_processor_type": PROCESSOR_TYPE,
            "patch_size": self.patch_size,
            "merge_kernel_size": list(self.merge_kernel_size),
            "in_token_limit": self.in_token_limit,
            "pad_input": self.pad_input,
            "image_mean": list(self.image_mean),
            "image_std": list(self.image_std),
        }

    def grid(self, width: int, height: int) -> PatchGrid:
        """How a picture of this size is resized and cut. Raises ImageError for a size that cannot be."""
        patch, merge = self.patch_size, self.merge_kernel_size[0]
        resized = self._resized(width, height)
        if self.pad_input:
            columns, rows = (math.ceil(side / (patch * merge)) * merge for side in resized)
            offset = (0, 0)
        else:  # the released code crops to whole patches, not to whole tokens
            columns, rows = (side // patch for side in resized)
            offset = (round((resized[0] - columns * patch) / 2), round((resized[1] - rows * patch) / 2))
        if max(rows, columns) >= MAX_GRID_SIDE:
            raise ImageError(
                f"a picture of {width} x {height} pixels makes a grid of {rows} x {columns} patches, but a side must "
                f"stay under {MAX_GRID_SIDE} ({(MAX_GRID_SIDE - merge) * patch} pixels); shrink or cut its long side"
            )
        if min(rows, columns) < 1 or rows % merge or columns % merge:
            raise ImageError(
                f"a picture of {width} x {height} pixels is cropped to {rows} x {columns} patches, which do not "
                "pair up into visual tokens; set pad_input to true in preprocessor_config.json, as released"
            )
        return PatchGrid((width, height), resized, (rows, columns), patch, merge, offset)

    def _resized(self, width: int, height: int) -> tuple[int, int]:
        """Shrinks to the limit, never enlarges. The limit is met before padding, so the padded grid may exceed it."""
        patches = (width // self.patch_size) * (height // self.patch_size)
        if patches <= self.in_token_limit:
            return width, height
        scale = math.sqrt(self.in_token_limit / patches)
        return max(1, int(width * scale)), max(1, int(height * scale))  # 0 only with limits far below the released ones

    def __call__(self, images: Sequence[ImageSource]) -> tuple[Tensor, Tensor, list[Picture]]:
        """Pictures -> pixel_values (N, 3, patch, patch) float32, image_grid_hws (n, 2) int64, one Picture each.

        N counts the patches of all pictures, one picture after another, row by row. Raises ImageError.
        """
        pictures = []
        for source in images:
            image = open_image(source)
            pictures.append(Picture(image, self.grid(*image.size)))
        patches = [self._patches(picture) for picture in pictures]
        pixel_values = torch.cat(patches) if patches else torch.empty(0, 3, self.patch_size, self.patch_size)
        grids = torch.tensor([picture.grid.grid for picture in pictures], dtype=torch.int64).reshape(-1, 2)
        return pixel_values, grids, pictures

    def _patches(self, picture: Picture) -> Tensor:
        grid, image = picture.grid, picture.image
        if image.size != grid.resized:
            image = image.resize(grid.resized, Image.Resampling.BICUBIC)
        left, top = grid.offset
        # A box that reaches past the right or bottom edge is filled with black, which is the padding.
        image = image.crop((left, top, left + grid.padded[0], top + grid.padded[1]))
        pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1).to(torch.float32) / 255  # (3, height, width)
        mean, std = (torch.tensor(numbers)[:, None, None] for numbers in (self.image_mean, self.image_std))
        side = self.patch_size
        return rearrange((pixels - mean) / std, "c (h y) (w x) -> (h w) c y x", y=side, x=side).contiguous()


class _Keys:
    """Reads the keys of one file; each refusal names the file, the key and what belongs there."""

    def __init__(self, data: dict[str, Any], source: str):
        self.data, self.source = data, source

    def _get(self, key: str, wanted: str, fits: Any) -> Any:
        if key not in self.data:
            raise ImageError(f"{self.source}: {key} is missing; add it ({wanted}), no default is assumed")
        if not fits(self.data[key]):
            raise ImageError(f"{self.source}: {key}={shown(self.data[key])} is not usable; it must be {wanted}")
        return self.data[key]

    def count(self, key: str) -> int:
        return self._get(key, f"a whole number from 1 to {LARGEST[key]}", lambda value: _is_count(value, LARGEST[key]))

    def pair(self, key: str) -> tuple[int, int]:
        def usable(value: Any) -> bool:
            return isinstance(value, list) and len(value) == 2 and all(_is_count(v, LARGEST[key]) for v in value)

        first, second = self._get(key, f"a list of 2 whole numbers from 1 to {LARGEST[key]}", usable)
        return first, second

    def switch(self, key: str) -> bool:
        return self._get(key, "true or false", lambda value: isinstance(value, bool))

    def colours(self, key: str, range_: str, fits: Any) -> tuple[float, float, float]:
        def usable(value: Any) -> bool:
            numbers = isinstance(value, int | float) and not isinstance(value, bool)
            return numbers and fits(value)

        wanted = f"a list of 3 numbers {range_}"
        red, green, blue = self._get(
            key, wanted, lambda v: isinstance(v, list) and len(v) == 3 and all(map(usable, v))
        )
        return float(red), float(green), float(blue)


def _is_count(value: Any, most: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 < value <= most


def open_image(source: ImageSource) -> Image.Image:
    """Any picture -> a new RGB picture, upright, transparency on white, the first frame of an animation.

    Takes a path, the bytes of a file, a base64 `data:` address, a Pillow image, or a uint8 array (H, W), (H, W, 1),
    (H, W, 3) or (H, W, 4). Fetches nothing. Raises ImageError, in one sentence.
    """
    name = "the picture"
    if isinstance(source, np.ndarray):
        source = _from_array(source)
    elif isinstance(source, str) and source.startswith("data:"):
        source = _from_data_address(source)
    if isinstance(source, Image.Image):
        return _finish(source, name)
    if isinstance(source, bytes | bytearray | memoryview):
        data = bytes(source)
        if not data:
            raise ImageError("the picture has 0 bytes; it was not uploaded or saved completely")
        return _decode(BytesIO(data), name)
    if not isinstance(source, str | Path):
        raise ImageError(
            f"a picture cannot be made from {type(source).__name__}; "
            "give a path, the bytes of a file, a Pillow image or a uint8 array"
        )
    if str(source).lower().startswith(("http://", "https://", "http:/", "https:/")):
        raise ImageError(f"{source} is an address, and nothing is fetched; download it and give the path of the file")
    if not str(source):
        raise ImageError("the path of the picture is empty; give the path of a file")
    try:
        path = Path(source).expanduser()
        if path.is_dir():
            raise ImageError(f"{source} is a folder; give the path of one picture in it")
        if not path.exists():
            raise ImageError(f"there is no file {source}; check the path of the picture")
        if path.stat().st_size == 0:
            raise ImageError(f"{source} has 0 bytes; it was not saved completely")
        file = path.open("rb")
    except ImageError:
        raise
    except (OSError, ValueError, RuntimeError) as error:  # no permission, a NUL in the name, no home folder
        raise ImageError(f"cannot open {shown(str(source))} ({short(error)}); check the path of the picture") from error
    with file:
        return _decode(file, str(source))


def _decode(file: Any, name: str) -> Image.Image:
    with _DECODING, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow warns of large sizes and damaged tags; both are handled here
        try:
            image = Image.open(file, formats=FORMATS)
        except Image.DecompressionBombError as error:
            raise ImageError(_too_large(name, None)) from error
        except Exception as error:  # decoders raise whatever their format's damage trips over
            raise ImageError(f"{name} is not a picture that can be read; give a PNG, JPEG, WebP or similar") from error
        return _convert(image, name)


def _finish(image: Image.Image, name: str) -> Image.Image:
    with _DECODING, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return _convert(image, name)


def _convert(image: Image.Image, name: str) -> Image.Image:
    width, height = image.size
    if width < 1 or height < 1:
        raise ImageError(f"{name} is {width} x {height} pixels and has nothing to see; give a picture of 1 x 1 or more")
    if width * height > MAX_PIXELS:
        raise ImageError(_too_large(name, image.size))
    try:
        image.load()
    except Image.DecompressionBombError as error:
        raise ImageError(_too_large(name, None)) from error
    except Exception as error:  # see above
        raise ImageError(f"{name} is damaged or cut off ({short(error)}); save or download it again") from error
    try:
        image = ImageOps.exif_transpose(image)
    except Exception:  # a damaged tag says nothing about which way is up
        pass
    try:
        return _to_rgb(image, name)
    except ImageError:
        raise
    except Exception as error:
        raise ImageError(f"{name} has colours of kind {image.mode} that cannot be converted; save it as RGB") from error


def _to_rgb(image: Image.Image, name: str) -> Image.Image:
    if image.mode.startswith("I"):  # 16 bits a pixel; Pillow's own conversion would clip at 255
        return Image.fromarray((np.array(image).clip(0, 65535) / 257).round().astype(np.uint8)).convert("RGB")
    if image.mode == "F":
        raise ImageError(f"{name} has floating-point pixels, whose white is unknown; convert it to 8 bits a colour")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, (255, 255, 255, 255)), image)
    return image.convert("RGB") if image.mode != "RGB" else image.copy()


def _too_large(name: str, size: tuple[int, int] | None) -> str:
    how_large = f"{size[0]} x {size[1]} pixels" if size else "larger"
    return f"{name} is {how_large}, over the limit of {MAX_PIXELS:,} pixels; shrink it before giving it to the model"


def _from_array(array: np.ndarray) -> Image.Image:
    if array.dtype != np.uint8:
        raise ImageError(f"an array of {array.dtype} is not a picture; scale it to 0..255 and convert it to uint8")
    if array.ndim == 3 and array.shape[2] == 1:
        array = array[:, :, 0]
    if not (array.ndim == 2 or array.ndim == 3 and array.shape[2] in (3, 4)) or 0 in array.shape:
        raise ImageError(
            f"an array of shape {array.shape} is not a picture; give (H, W), (H, W, 3) or (H, W, 4), colours last"
        )
    if array.shape[0] * array.shape[1] > MAX_PIXELS:
        raise ImageError(_too_large("the picture", (array.shape[1], array.shape[0])))
    return Image.fromarray(np.ascontiguousarray(array))


def _from_data_address(address: str) -> bytes:
    head, comma, body = address.partition(",")
    if not comma or not head.endswith(";base64"):
        raise ImageError("a data: address must read data:image/...;base64,...; give the bytes of the file instead")
    try:
        return base64.b64decode(body, validate=True)
    except (binascii.Error, ValueError) as error:
        raise ImageError(f"the data: address is not valid base64 ({error}); give the file's bytes instead") from error
