"""Every kind of image file becomes the RGB values that its maker meant."""

import io
import struct
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sparseinst_jax.data import images
from sparseinst_jax.data.coco import load_coco, read_record
from sparseinst_jax.data.images import as_rgb, read_header, read_image, read_size, read_values

# Four colours far apart, so that no exchange of channels, rows or columns goes unnoticed.
RGB = np.array([[[200, 30, 10], [20, 210, 40]], [[50, 60, 220], [90, 90, 90]]], np.uint8)
GREY = np.array([[200, 30], [60, 90]], np.uint8)
GREY_RGB = np.repeat(GREY[..., None], 3, axis=2)
ALPHA = np.array([[0, 128], [255, 1]], np.uint8)
DEEP = RGB.astype(np.uint16) * 256 + 77  # 77: what the upper eight bits do not hold
COLOUR = Image.fromarray(RGB)
TRANSLUCENT = Image.fromarray(np.dstack([RGB, ALPHA]))
OTHER = Image.fromarray(255 - RGB)
EXACT = dict(lossless=True, exact=True)  # of WebP, also where it is transparent


def save(image, path, **options):
    image.save(path, **options)


def save_frames(image, path, **options):
    image.save(path, save_all=True, append_images=[OTHER], **options)


def chunk(name, content, check=None):
    """A chunk of a PNG; `check` in place of its checksum."""
    check = struct.pack(">I", zlib.crc32(name + content)) if check is None else check
    return struct.pack(">I", len(content)) + name + content + check


def write_png_48(image, path):
    """A PNG of 16 bits a channel, which Pillow reads and does not write."""
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in DEEP)
    header = struct.pack(">IIBBBBB", 2, 2, 16, 2, 0, 0, 0)
    path.write_bytes(
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(rows))
        + chunk(b"IEND", b"")
    )


def write_tiff_48(image, path):
    """A TIFF of 16 bits a channel: header, pixels, bits of each channel, then the tags."""
    pixels = DEEP.astype("<u2").tobytes()
    bits_at = 8 + len(pixels)
    short, long = 3, 4
    tags = [
        (256, short, 1, 2),  # width
        (257, short, 1, 2),  # height
        (258, short, 3, bits_at),
        (259, short, 1, 1),  # not compressed
        (262, short, 1, 2),  # RGB
        (273, long, 1, 8),  # where the pixels are
        (277, short, 1, 3),  # channels
        (278, short, 1, 2),  # rows of the strip
        (279, long, 1, len(pixels)),
    ]
    content = b"II*\0" + struct.pack("<I", bits_at + 6) + pixels + struct.pack("<HHH", 16, 16, 16)
    content += struct.pack("<H", len(tags))
    content += b"".join(struct.pack("<HHII", *tag) for tag in tags) + struct.pack("<I", 0)
    path.write_bytes(content)


PALETTE = COLOUR.quantize(4)
CASES = {
    # name: (how it is written, what, options, expected, tolerance)
    "colour.png": (save, COLOUR, {}, RGB, 0),
    "colour.bmp": (save, COLOUR, {}, RGB, 0),
    "colour.tif": (save, COLOUR, {}, RGB, 0),
    "colour.webp": (save, COLOUR, EXACT, RGB, 0),
    "alpha.png": (save, TRANSLUCENT, {}, RGB, 0),
    "alpha.webp": (save, TRANSLUCENT, EXACT, RGB, 0),
    "grey.png": (save, Image.fromarray(GREY), {}, GREY_RGB, 0),
    "grey_alpha.png": (save, Image.fromarray(np.dstack([GREY, ALPHA])), {}, GREY_RGB, 0),
    "two_levels.png": (
        save,
        Image.fromarray(GREY > 50),
        {},
        np.where(GREY_RGB > 50, 255, 0),
        0,
    ),
    "palette.png": (save, PALETTE, {}, RGB, 0),
    "palette_alpha.png": (save, PALETTE, dict(transparency=bytes([0, 128, 255])), RGB, 0),
    "palette_hole.png": (save, PALETTE, dict(transparency=2), RGB, 0),
    "palette_hole.gif": (save, PALETTE, dict(transparency=1), RGB, 0),
    "cmyk.tif": (save, COLOUR.convert("CMYK"), {}, RGB, 0),
    "deep_grey.png": (save, Image.fromarray(DEEP[..., 0]), {}, RGB[..., :1].repeat(3, 2), 0),
    "deep_grey.tif": (save, Image.fromarray(DEEP[..., 0]), {}, RGB[..., :1].repeat(3, 2), 0),
    "deep_colour.png": (write_png_48, None, {}, RGB, 0),
    "deep_colour.tif": (write_tiff_48, None, {}, RGB, 0),
    "fractions.tif": (save, Image.fromarray((GREY / 255).astype(np.float32)), {}, GREY_RGB, 1),
    "moving.gif": (save_frames, COLOUR, {}, RGB, 0),
    "moving.png": (save_frames, COLOUR, {}, RGB, 0),
    "moving.webp": (save_frames, COLOUR, EXACT, RGB, 0),
    "pages.tif": (save_frames, COLOUR, {}, RGB, 0),
}


@pytest.mark.parametrize("name", CASES)
def test_a_file_of_this_kind_is_read_as_its_rgb_values(tmp_path, name):
    write, image, options, expected, tolerance = CASES[name]
    write(image, tmp_path / name, **options)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # a user can do nothing about Pillow's
        pixels = read_image(tmp_path / name)
    assert pixels.dtype == np.uint8
    np.testing.assert_allclose(pixels.astype(int), expected.astype(int), atol=tolerance)


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
def test_a_jpeg_of_this_mode_is_read_as_its_rgb_values(tmp_path, mode):
    # One colour: JPEG mixes those of neighbours.
    image = Image.new("RGB", (16, 16), (200, 30, 10)).convert(mode)
    image.save(tmp_path / "a.jpg", quality=100)
    grey = round(0.299 * 200 + 0.587 * 30 + 0.114 * 10)
    expected = (grey, grey, grey) if mode == "L" else (200, 30, 10)
    np.testing.assert_allclose(read_image(tmp_path / "a.jpg")[5, 7], expected, atol=3)


LYING = np.arange(6, dtype=np.uint8).reshape(2, 3).repeat(16, 0).repeat(16, 1) * 40
UPRIGHT = {  # EXIF orientation: what has to be done to the stored image
    1: LYING,
    2: LYING[:, ::-1],
    3: LYING[::-1, ::-1],
    4: LYING[::-1],
    5: LYING.T,
    6: np.rot90(LYING, -1),
    7: np.rot90(LYING, 2).T,
    8: np.rot90(LYING),
}


@pytest.mark.parametrize("orientation", UPRIGHT)
def test_an_exif_orientation_is_applied(tmp_path, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    image = Image.fromarray(LYING)
    image.save(tmp_path / "a.jpg", exif=exif, quality=100)
    image.save(tmp_path / "a.png", exif=exif)
    image.save(tmp_path / "a.webp", exif=exif, lossless=True)
    for name in ("a.jpg", "a.png", "a.webp"):
        pixels = read_image(tmp_path / name)[..., 0].astype(int)
        np.testing.assert_allclose(pixels, UPRIGHT[orientation], atol=4)
        header = read_header(tmp_path / name)
        assert (header.stored_size, header.orientation) == ((32, 48), orientation)


def test_a_header_says_kind_and_animation(tmp_path):
    save_frames(COLOUR, tmp_path / "a.gif")
    assert read_header(tmp_path / "a.gif").is_animated
    Image.fromarray(DEEP[..., 0]).save(tmp_path / "a.png")
    assert read_header(tmp_path / "a.png")[:4] == ("PNG I;16", (2, 2), 1, False)


def _record(tmp_path, name, height, width):
    image = f'{{"id": 1, "file_name": "{name}", "height": {height}, "width": {width}}}'
    (tmp_path / "a.json").write_text(
        f'{{"images": [{image}], "categories": [{{"id": 1, "name": "a"}}]}}'
    )
    return load_coco(tmp_path / "a.json", tmp_path).records[0]


def test_the_json_has_the_size_of_the_upright_image_and_the_message_says_so(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(LYING).save(tmp_path / "phone.jpg", exif=exif)
    assert read_record(_record(tmp_path, "phone.jpg", 48, 32)).shape == (48, 32, 3)
    with pytest.raises(ValueError) as error:
        read_record(_record(tmp_path, "phone.jpg", 32, 48))
    text = str(error.value)
    assert "phone.jpg is (48, 32) (height, width), the json says (32, 48)" in text
    assert "that is its size without its EXIF orientation (6)" in text
    assert "exchange height and width in the json" in text and "save it without EXIF data" in text


def test_exchanged_and_other_sizes_are_told_apart(tmp_path):
    Image.fromarray(LYING).save(tmp_path / "a.png")
    with pytest.raises(ValueError, match="height and width are exchanged; correct the json"):
        read_record(_record(tmp_path, "a.png", 48, 32))
    with pytest.raises(ValueError, match=r"the json says \(64, 96\); correct the json, or give"):
        read_record(_record(tmp_path, "a.png", 64, 96))


@pytest.mark.parametrize("content", [b"", b"\0\0\0\x18ftypheic0000", b"<html>not found</html>"])
def test_what_is_no_image_is_refused_with_a_cure(tmp_path, content):
    (tmp_path / "a.jpg").write_bytes(content)
    with pytest.raises(ValueError, match=r"a\.jpg cannot be read: .*convert it to JPEG or PNG"):
        read_image(tmp_path / "a.jpg")


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF", "BMP", "GIF"])
def test_half_a_file_is_refused_by_name(tmp_path, kind):
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(noise).save(buffer, kind)
    whole = buffer.getvalue()
    (tmp_path / "half.img").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"half\.img cannot be read"):
        read_image(tmp_path / "half.img")


HUGE_TEXT = b"k\0\0" + zlib.compress(bytes(2 << 20))
DAMAGED_METADATA = {
    "no TIFF in the EXIF data": chunk(b"eXIf", b"JUNKJUNK"),
    "EXIF data that are cut off": chunk(b"eXIf", b"MM\0*"),
    "a compressed text of 2 MB": chunk(b"zTXt", HUGE_TEXT),
    "a compressed text of 2 MB, last": chunk(b"zTXt", HUGE_TEXT),
    "a colour profile of 2 MB": chunk(b"iCCP", HUGE_TEXT),
    "a wrong checksum of a text": chunk(b"tEXt", b"a\0b", check=b"1234"),
    "an unknown chunk with a wrong checksum": chunk(b"prVt", b"ab", check=b"1234"),
}


@pytest.mark.parametrize("name", DAMAGED_METADATA)
def test_damaged_metadata_do_not_keep_the_pixels_of_a_png(tmp_path, caplog, name):
    buffer = io.BytesIO()
    PALETTE.save(buffer, "PNG", transparency=2)  # tRNS is not left out
    whole, path = buffer.getvalue(), tmp_path / "a.png"
    place = whole.index(b"IEND" if name.endswith("last") else b"IDAT") - 4
    path.write_bytes(whole[:place] + DAMAGED_METADATA[name] + whole[place:])
    images._warned.clear()
    for _ in range(2):
        np.testing.assert_array_equal(read_image(path), RGB)
        np.testing.assert_array_equal(as_rgb(path.read_bytes()), RGB)
    warned = [record.getMessage() for record in caplog.records]
    assert len(warned) == 1 and f"image {path}: its metadata are damaged" in warned[0]
    assert read_header(path) == ("PNG P", (2, 2), 1, False, True)
    assert read_size(path) == (2, 2) and read_values(path, "a").shape == (2, 2)
    path.write_bytes(path.read_bytes()[:-20].replace(b"IDAT", b"IDA"))  # pixels as well
    with pytest.raises(ValueError, match=r"a\.png cannot be read"):
        read_image(path)


@pytest.mark.parametrize("kind", ["JPEG", "WEBP", "PNG"])
def test_broken_exif_leaves_the_pixels_as_stored_from_files_and_from_pillow(tmp_path, kind):
    Image.fromarray(LYING).save(tmp_path / "plain", kind)
    Image.fromarray(LYING).save(tmp_path / "broken", kind, exif=b"Exif\0\0JUNKJUNK")
    expected = read_image(tmp_path / "plain")
    np.testing.assert_array_equal(read_image(tmp_path / "broken"), expected)
    np.testing.assert_array_equal(as_rgb(Image.open(tmp_path / "broken")), expected)
    # Pillow itself takes broken EXIF data of a JPEG for none.
    assert read_header(tmp_path / "broken").has_damaged_metadata == (kind != "JPEG")


@pytest.mark.parametrize("kind, value", [(3, 0), (3, 9), (2, b"6\0"), (12, b"\0\0\0\0")])
def test_an_orientation_that_is_none_turns_nothing(tmp_path, kind, value):
    value = struct.pack(">HH", value, 0) if kind == 3 else value.ljust(4, b"\0")
    tag = struct.pack(">HHI", 0x0112, kind, 1) + value
    exif = b"Exif\0\0MM\0*\0\0\0\x08\0\x01" + tag + bytes(4)
    for name in ("a.png", "a.jpg", "a.webp"):
        Image.fromarray(LYING).save(tmp_path / name, exif=exif)
        assert read_image(tmp_path / name).shape == (32, 48, 3)
        assert read_header(tmp_path / name).orientation == 1


def test_bytes_files_and_streams_are_read_like_the_file(tmp_path):
    path = tmp_path / "a.png"
    COLOUR.save(path)
    content = path.read_bytes()

    class Stream(io.BytesIO):
        """Like the answer of a server: cannot go back."""

        def seek(self, *_):
            raise io.UnsupportedOperation

    with open(path, "rb") as file:
        for same in (content, bytearray(content), io.BytesIO(content), file, Stream(content)):
            np.testing.assert_array_equal(as_rgb(same), RGB)
        assert not file.closed
    with pytest.raises(ValueError, match="image of 9 bytes cannot be read: it is damaged"):
        as_rgb(b"no image.")
    with pytest.raises(ValueError, match=r"a\.png cannot be read"), open(path) as text:
        as_rgb(text)


def test_a_pillow_image_that_is_cut_off_is_refused_by_name(tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    Image.fromarray(noise).save(tmp_path / "a.png")
    (tmp_path / "a.png").write_bytes((tmp_path / "a.png").read_bytes()[:5000])
    with pytest.raises(ValueError, match=r"a\.png cannot be read \(image file is truncated"):
        as_rgb(Image.open(tmp_path / "a.png"))


@pytest.mark.parametrize(
    "path", ["https://a.org/b.jpg", "s3://a/b.png", "data:image/png;base64,AA"]
)
def test_addresses_are_refused_with_a_cure(path):
    for given in (path, Path(path), path + 5000 * "A"):
        with pytest.raises(
            ValueError, match="is an address, not a file, and nothing is downloaded"
        ):
            as_rgb(given)


@pytest.mark.parametrize("wrong", [None, 5, [[1, 2], [3, 4]], [[1, 2], [3]], ["a.jpg"], {}])
def test_what_is_no_image_is_named(wrong):
    with pytest.raises(ValueError, match=f"expected an image: a path.*got {type(wrong).__name__}"):
        as_rgb(wrong)


def test_an_array_is_copied():
    frame = np.zeros((2, 2, 3), np.uint8)
    image = as_rgb(frame)
    frame[:] = 255
    assert not image.any()
