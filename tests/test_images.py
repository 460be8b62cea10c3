"""Pictures to patches: the sizes and pixels of the released processor, geometry there and back, and every bad input."""

from __future__ import annotations

import base64
import io
import json
import math
import struct
import threading
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from kimi_vl_ref.images import MAX_PIXELS, ImageError, ImageProcessor, PatchGrid, open_image

RELEASED = {
    "image_processor_type": "KimiVLImageProcessor",
    "in_token_limit": 4096,
    "patch_size": 14,
    "num_pooled_tokens": 1024,
    "merge_kernel_size": [2, 2],
    "pad_input": True,
    "image_mean": [0.5, 0.5, 0.5],
    "image_std": [0.5, 0.5, 0.5],
}
PROCESSOR = ImageProcessor.from_dict(RELEASED)
PROCESSOR_2506 = ImageProcessor.from_dict(RELEASED | {"in_token_limit": 16384})
SMALL = ImageProcessor.from_dict(RELEASED | {"in_token_limit": 64})  # resizes nearly everything


def picture(width: int, height: int, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def file_bytes(image: Image.Image, format: str = "PNG", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


# width, height: (resized, grid, tokens) at a limit of 4096 patches, the same at 16384
WORKED = {
    (224, 224): (((224, 224), (16, 16), 64), ((224, 224), (16, 16), 64)),
    (640, 480): (((640, 480), (36, 46), 414), ((640, 480), (36, 46), 414)),
    (1024, 1024): (((897, 897), (66, 66), 1089), ((1024, 1024), (74, 74), 1369)),
    (1792, 1792): (((896, 896), (64, 64), 1024), ((1792, 1792), (128, 128), 4096)),
    (1920, 1080): (((1196, 672), (48, 86), 1032), ((1920, 1080), (78, 138), 2691)),
    (3840, 2160): (((1196, 672), (48, 86), 1032), ((2392, 1345), (98, 172), 4214)),
    (28, 28): (((28, 28), (2, 2), 1), ((28, 28), (2, 2), 1)),
    (1, 1000): (((1, 1000), (72, 2), 36), ((1, 1000), (72, 2), 36)),
    (1280, 720): (((1202, 676), (50, 86), 1075), ((1280, 720), (52, 92), 1196)),
    (896, 896): (((896, 896), (64, 64), 1024), ((896, 896), (64, 64), 1024)),
    (897, 897): (((897, 897), (66, 66), 1089), ((897, 897), (66, 66), 1089)),
    (7140, 28): (((7140, 28), (2, 510), 255), ((7140, 28), (2, 510), 255)),
}


@pytest.mark.parametrize("size", WORKED)
def test_sizes_are_those_of_the_released_processor_at_both_limits(size: tuple[int, int]):
    for processor, (resized, rows_columns, tokens) in zip((PROCESSOR, PROCESSOR_2506), WORKED[size], strict=True):
        grid = processor.grid(*size)
        assert (grid.original, grid.resized, grid.grid, grid.token_count) == (size, resized, rows_columns, tokens)
        assert grid.padded == (rows_columns[1] * 14, rows_columns[0] * 14)


@pytest.mark.parametrize(
    ("size", "grids"),
    [((7168, 28), ("2 x 512", "2 x 512")), ((100, 20000), ("916 x 6", "1430 x 8"))],
)
def test_a_side_of_512_patches_is_refused_with_the_grid_and_the_largest_side(size, grids):
    for processor, grid in zip((PROCESSOR, PROCESSOR_2506), grids, strict=True):
        with pytest.raises(ImageError, match=f"{size[0]} x {size[1]} pixels.*{grid} patches.*7140 pixels.*shrink"):
            processor.grid(*size)


def test_the_padded_grid_may_exceed_the_limit_which_is_met_before_padding():
    assert PROCESSOR.grid(147, 6209).patch_count == 5136
    assert PROCESSOR_2506.grid(483, 6923).patch_count == 17640


@given(size=st.tuples(st.integers(1, 7000), st.integers(1, 7000)))
@settings(deadline=None, max_examples=60)
def test_no_legal_picture_exceeds_the_limit_by_more_than_its_padding(size: tuple[int, int]):
    for processor, worst in ((PROCESSOR, 5136), (PROCESSOR_2506, 17640)):
        grid = processor.grid(*size)
        assert grid.patch_count <= worst
        assert grid.resized[0] <= size[0] and grid.resized[1] <= size[1]
        assert all(0 <= padded - resized < 28 for padded, resized in zip(grid.padded, grid.resized, strict=True))


@given(width=st.integers(1, 13), height=st.integers(1, 7000))
@settings(deadline=None, max_examples=30)
def test_a_side_under_one_patch_is_never_resized(width: int, height: int):
    assert PROCESSOR.grid(width, height).resized == (width, height)
    assert PROCESSOR.grid(height, width).resized == (height, width)


def test_resizing_and_padding_are_plain_pillow_to_the_last_bit():
    image = picture(1000, 937)
    resized = image.resize((934, 876), Image.Resampling.BICUBIC)
    padded = Image.new("RGB", (952, 896))
    padded.paste(resized, (0, 0))
    expected = (torch.from_numpy(np.array(padded)).permute(2, 0, 1).float() / 255 - 0.5) / 0.5

    pixel_values, grids, pictures = PROCESSOR([image])

    assert grids.tolist() == [[64, 68]] and grids.dtype == torch.int64
    assert pixel_values.shape == (64 * 68, 3, 14, 14) and pixel_values.dtype == torch.float32
    for at in (0, 67, 68, 63 * 68 + 67, 1234):
        row, column = divmod(at, 68)
        cut = expected[:, row * 14 : row * 14 + 14, column * 14 : column * 14 + 14]
        assert torch.equal(pixel_values[at], cut)
    put_together = pixel_values.reshape(64, 68, 3, 14, 14).permute(2, 0, 3, 1, 4).reshape(3, 896, 952)
    assert torch.equal(put_together, expected)
    assert pictures[0].image.size == (1000, 937)  # what was given, not what was resized


def test_padding_is_black_and_lies_at_the_right_and_bottom():
    pixel_values, grids, _ = PROCESSOR([Image.new("RGB", (15, 1), "white")])
    assert grids.tolist() == [[2, 2]]
    whole = pixel_values.reshape(2, 2, 3, 14, 14).permute(2, 0, 3, 1, 4).reshape(3, 28, 28)
    assert (whole[:, 0, :15] == 1).all()
    assert (whole == -1).sum() == 3 * (28 * 28 - 15)


def test_mean_and_std_come_from_the_file():
    other = ImageProcessor.from_dict(RELEASED | {"image_mean": [0.1, 0.2, 0.3], "image_std": [0.5, 0.25, 2]})
    white = other([Image.new("RGB", (28, 28), "white")])[0]
    assert torch.allclose(white[0, :, 0, 0], torch.tensor([1.8, 3.2, 0.35]))


def test_pictures_packed_are_pictures_alone():
    images = [picture(30, 60), picture(100, 20, seed=1)]
    together, grids, pictures = PROCESSOR(images)
    alone = [PROCESSOR([image])[0] for image in images]
    assert torch.equal(together, torch.cat(alone))
    assert [tuple(grid) for grid in grids.tolist()] == [p.grid.grid for p in pictures] == [(6, 4), (2, 8)]


def test_no_pictures_make_empty_tensors():
    pixel_values, grids, pictures = PROCESSOR([])
    assert pixel_values.shape == (0, 3, 14, 14) and grids.shape == (0, 2) and pictures == []


def test_without_padding_the_middle_is_cut_out_and_an_odd_grid_is_refused():
    cropping = ImageProcessor.from_dict(RELEASED | {"pad_input": False})
    image = picture(62, 28 + 10)
    grid = cropping.grid(62, 38)
    assert (grid.grid, grid.offset) == ((2, 4), (3, 5))
    expected = (torch.from_numpy(np.array(image)[5:33, 3:59]).permute(2, 0, 1).float() / 255 - 0.5) / 0.5
    whole = cropping([image])[0].reshape(2, 4, 3, 14, 14).permute(2, 0, 3, 1, 4).reshape(3, 28, 56)
    assert torch.equal(whole, expected)
    assert grid.token_box(0) == (3, 5, 31, 33)
    with pytest.raises(ValueError, match="cropped off"):
        grid.patch_at(1, 20)
    for size in ((45, 28), (13, 28)):
        with pytest.raises(ImageError, match="pad_input"):
            cropping.grid(*size)


# Geometry

SIZES = st.tuples(st.integers(1, 900), st.integers(1, 900))
PROCESSORS = st.sampled_from([PROCESSOR, SMALL])


@given(size=SIZES, processor=PROCESSORS, at=st.tuples(st.floats(0, 1, exclude_max=True), st.floats(0, 1)))
@settings(deadline=None, max_examples=80)
def test_a_point_lies_in_the_boxes_of_its_patch_and_token(size, processor: ImageProcessor, at):
    x, y = at[0] * size[0], min(at[1] * size[1], math.nextafter(size[1], 0))
    grid = processor.grid(*size)
    patch, token = grid.patch_at(x, y), grid.token_at(x, y)
    assert grid.token_of_patch(patch) == token and patch in grid.patches_of_token(token)
    for box in (grid.patch_box(patch), grid.token_box(token)):
        assert box is not None
        assert box[0] - 1e-6 <= x <= box[2] + 1e-6 and box[1] - 1e-6 <= y <= box[3] + 1e-6


@given(size=SIZES, processor=PROCESSORS)
@settings(deadline=None, max_examples=25)
def test_boxes_tile_the_picture_and_their_centres_lead_back(size, processor: ImageProcessor):
    grid = processor.grid(*size)
    for count, box_of, at in (
        (grid.patch_count, grid.patch_box, grid.patch_at),
        (grid.token_count, grid.token_box, grid.token_at),
    ):
        boxes = {index: box for index in range(count) if (box := box_of(index)) is not None}
        area = sum((x1 - x0) * (y1 - y0) for x0, y0, x1, y1 in boxes.values())
        assert area == pytest.approx(size[0] * size[1])
        for index, (x0, y0, x1, y1) in boxes.items():
            assert 0 <= x0 < x1 <= size[0] and 0 <= y0 < y1 <= size[1]
            assert at((x0 + x1) / 2, (y0 + y1) / 2) == index


@given(size=SIZES)
@settings(deadline=None, max_examples=30)
def test_every_patch_belongs_to_one_token_and_a_token_has_four(size):
    grid = PROCESSOR.grid(*size)
    patches = [patch for token in range(grid.token_count) for patch in grid.patches_of_token(token)]
    assert sorted(patches) == list(range(grid.patch_count))
    assert all(len(grid.patches_of_token(token)) == 4 for token in range(grid.token_count))


def test_geometry_by_hand():
    grid = PatchGrid(original=(200, 80), resized=(100, 40), grid=(4, 8), patch_size=14, merge=2)
    assert (grid.padded, grid.token_grid, grid.token_count, grid.patch_count) == ((112, 56), (2, 4), 8, 32)
    assert grid.patches_of_token(5) == [18, 19, 26, 27] and grid.token_of_patch(27) == 5
    assert grid.token_box(5) == (56, 56, 112, 80)  # twice the resized picture's pixels, clipped at the bottom
    assert grid.patch_box(31) is None and grid.patch_box(23) == (196, 56, 200, 80)
    assert grid.token_at(199.5, 79.9) == 7
    assert grid.token_heat(torch.arange(16.0).reshape(2, 8)).shape == (2, 2, 4)
    assert grid.token_heat(list(range(8)))[1].tolist() == [4, 5, 6, 7]
    assert grid.patch_heat(np.zeros(32)).shape == (4, 8)


def test_geometry_refuses_what_does_not_exist():
    grid = PROCESSOR.grid(56, 28)
    with pytest.raises(ValueError, match="token 2 does not exist; they are numbered 0 to 1"):
        grid.token_box(2)
    with pytest.raises(ValueError, match="patch -1 does not exist; they are numbered 0 to 7"):
        grid.patch_box(-1)
    for point in ((56, 0), (0, 28), (-0.1, 0), (float("nan"), 0)):
        with pytest.raises(ValueError, match="outside the picture of 56 x 28"):
            grid.token_at(*point)
    with pytest.raises(ValueError, match="3 values do not fit a picture of 1 x 2 visual tokens"):
        grid.token_heat(torch.zeros(3))


# The configuration file


def test_the_file_is_read_and_written_back(tmp_path: Path):
    path = tmp_path / "preprocessor_config.json"
    path.write_text(json.dumps(PROCESSOR.to_dict()))
    assert ImageProcessor.from_json(path) == PROCESSOR
    assert (PROCESSOR.merge_kernel_size, PROCESSOR.in_token_limit) == ((2, 2), 4096)


@pytest.mark.parametrize("key", sorted(RELEASED.keys() - {"image_processor_type", "num_pooled_tokens"}))
def test_a_missing_key_is_named_and_never_assumed(key: str, tmp_path: Path):
    path = tmp_path / "preprocessor_config.json"
    path.write_text(json.dumps({k: v for k, v in RELEASED.items() if k != key}))
    with pytest.raises(ImageError, match=f"preprocessor_config.json: {key} is missing; add it"):
        ImageProcessor.from_json(path)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("image_processor_type", "CLIPImageProcessor"),
        ("patch_size", 0),
        ("patch_size", True),
        ("patch_size", "14"),
        ("merge_kernel_size", 2),
        ("merge_kernel_size", [2, 2, 2]),
        ("merge_kernel_size", [2, 1]),
        ("in_token_limit", 1.5),
        ("pad_input", 1),
        ("image_mean", [0.5]),
        ("image_mean", [0.5, 0.5, "x"]),
        ("image_std", [0.5, 0.5, 0]),
        ("image_std", [0.5, 0.5, float("nan")]),
    ],
)
def test_an_unusable_value_is_named(key: str, value):
    with pytest.raises(ImageError, match=key):
        ImageProcessor.from_dict(RELEASED | {key: value})


def test_a_damaged_or_missing_file_is_named(tmp_path: Path):
    path = tmp_path / "preprocessor_config.json"
    with pytest.raises(ImageError, match="cannot read .*preprocessor_config.json"):
        ImageProcessor.from_json(path)
    for text in ("{", "[]", "\xff"):
        path.write_bytes(text.encode("latin-1"))
        with pytest.raises(ImageError, match="preprocessor_config.json"):
            ImageProcessor.from_json(path)


# Opening pictures


def test_every_kind_of_source_gives_the_same_picture(tmp_path: Path):
    image = picture(20, 10)
    data = file_bytes(image)
    path = tmp_path / "a picture.png"
    path.write_bytes(data)
    address = "data:image/png;base64," + base64.b64encode(data).decode()
    for source in (image, data, path, str(path), np.array(image), address):
        opened = open_image(source)
        assert opened.mode == "RGB" and np.array_equal(np.array(opened), np.array(image))


def test_the_given_picture_is_not_shared():
    image = picture(4, 4)
    opened = open_image(image)
    opened.putpixel((0, 0), (1, 2, 3))
    assert image.getpixel((0, 0)) != (1, 2, 3)


def test_transparency_is_laid_on_white():
    clear = Image.new("RGBA", (2, 1), (255, 0, 0, 0))
    clear.putpixel((1, 0), (255, 0, 0, 255))
    palette = clear.convert("P")
    palette.info["transparency"] = palette.getpixel((0, 0))
    for image in (clear, Image.open(io.BytesIO(file_bytes(clear)))):
        opened = open_image(image)
        assert opened.getpixel((0, 0)) == (255, 255, 255) and opened.getpixel((1, 0)) == (255, 0, 0)
    grey = open_image(Image.new("LA", (1, 1), (0, 128)))
    assert grey.getpixel((0, 0)) == (127, 127, 127)
    indexed = Image.new("P", (2, 1), 0)
    indexed.putpalette([10, 20, 30, 40, 50, 60])
    indexed.putpixel((1, 0), 1)
    opened = open_image(file_bytes(indexed, transparency=0))
    assert opened.getpixel((0, 0)) == (255, 255, 255) and opened.getpixel((1, 0)) == (40, 50, 60)


def test_other_colours_become_rgb():
    assert open_image(Image.new("1", (1, 1), 1)).getpixel((0, 0)) == (255, 255, 255)
    assert open_image(Image.new("L", (1, 1), 77)).getpixel((0, 0)) == (77, 77, 77)
    assert open_image(file_bytes(Image.new("CMYK", (8, 8), (0, 0, 0, 255)), "JPEG")).getpixel((0, 0)) == (0, 0, 0)
    sixteen = Image.fromarray(np.array([[0, 257 * 100, 65535]], dtype=np.uint16))
    assert np.array(open_image(file_bytes(sixteen)))[0, :, 0].tolist() == [0, 100, 255]
    with pytest.raises(ImageError, match="floating-point"):
        open_image(Image.new("F", (1, 1)))


def test_the_exif_orientation_is_applied():
    image = picture(4, 2)
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was held upright: turn by a quarter
    opened = open_image(file_bytes(image, exif=exif))
    assert opened.size == (2, 4) and opened.getpixel((1, 0)) == image.getpixel((0, 0))


def test_an_animation_shows_its_first_frame():
    frames = [Image.new("RGB", (3, 3), colour) for colour in ("red", "blue")]
    data = file_bytes(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert open_image(data).getpixel((1, 1)) == (255, 0, 0)


def test_one_pixel_is_a_picture():
    pixel_values, grids, pictures = PROCESSOR([Image.new("RGB", (1, 1), "white")])
    assert grids.tolist() == [[2, 2]] and pictures[0].grid.token_box(0) == (0, 0, 1, 1)
    assert (pixel_values == 1).sum() == 3


def _truncated(format: str) -> bytes:
    data = file_bytes(picture(64, 64), format)
    return data[: len(data) // 2]


BAD = {
    "empty": (b"", "0 bytes"),
    "text": (b"this is no picture at all", "not a picture"),
    "cut-png": (_truncated("PNG"), "damaged or cut off"),
    "cut-jpeg": (_truncated("JPEG"), "damaged or cut off"),
    "cut-header": (file_bytes(picture(64, 64))[:20], "not a picture|damaged"),
    "address": ("https://example.org/cat.png", "nothing is fetched"),
    "nowhere": ("no/such/file.png", "there is no file"),
    "nul": ("a\0b.png", "check the path"),
    "long-name": ("x" * 5000, "check the path"),
    "number": (7, "cannot be made from int"),
    "none": (None, "cannot be made from NoneType"),
    "float-array": (np.zeros((4, 4, 3)), "float64.*uint8"),
    "flat-array": (np.zeros(4, dtype=np.uint8), "shape"),
    "channels-first": (np.zeros((3, 8, 8), dtype=np.uint8), "colours last"),
    "no-pixels": (np.zeros((0, 8, 3), dtype=np.uint8), "shape"),
    "data-damaged": ("data:image/png;base64,@@@", "base64"),
    "data-plain": ("data:image/png,abc", "base64"),
    "bad-pillow": (Image.new("RGB", (0, 5)), "0 x 5 pixels"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_clear_sentence(name: str):
    source, words = BAD[name]
    with pytest.raises(ImageError, match=words) as caught:
        open_image(source)  # type: ignore[arg-type]
    message = str(caught.value)
    assert "\n" not in message and "; " in message or "cannot be made" in message


def test_folders_and_empty_files_are_named(tmp_path: Path):
    with pytest.raises(ImageError, match="is a folder"):
        open_image(tmp_path)
    (tmp_path / "empty.png").touch()
    with pytest.raises(ImageError, match="empty.png has 0 bytes"):
        open_image(tmp_path / "empty.png")


@pytest.mark.parametrize("side", [8_000, 10_000, 14_000])  # under, at and over Pillow's own two limits
def test_a_picture_with_too_many_pixels_is_refused_before_it_is_decoded(side: int, monkeypatch: pytest.MonkeyPatch):
    data = bytearray(file_bytes(Image.new("1", (1, 1))))
    data[16:24] = struct.pack(">II", side, side)  # a header that promises more than the file holds
    data[29:33] = struct.pack(">I", zlib.crc32(data[12:29]))
    monkeypatch.setattr(Image.Image, "convert", lambda *_: pytest.fail("decoded"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(ImageError, match=f"over the limit of {MAX_PIXELS:,} pixels; shrink it"):
            open_image(bytes(data))


def test_twenty_thousand_pixels_across_are_refused_with_the_remedy():
    with pytest.raises(ImageError, match="20000 x 30 pixels makes a grid.*shrink or cut"):
        PROCESSOR([Image.new("RGB", (20_000, 30))])


def test_threads_may_open_pictures_together_and_warnings_stay_as_they_were():
    data, before = file_bytes(picture(50, 50)), list(warnings.filters)
    threads = [threading.Thread(target=lambda: [open_image(data) for _ in range(20)]) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert list(warnings.filters) == before


FORMATS = st.sampled_from(["PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP"])


@given(data=st.binary(max_size=200), keep=st.integers(0, 300), format=FORMATS)
@settings(deadline=None, max_examples=100)
def test_damage_is_an_image_error_and_nothing_else(data: bytes, keep: int, format: str):
    whole = file_bytes(picture(9, 9), format)
    try:
        opened = open_image(whole[:keep] + data + whole[keep + len(data) :])
    except ImageError:
        return
    assert opened.mode == "RGB"
