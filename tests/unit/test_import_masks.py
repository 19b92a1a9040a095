"""Folders of mask images to COCO."""

import json
import struct
import zlib

import numpy as np
import pytest
from PIL import Image
from scipy import ndimage

from sparseinst_jax.data.coco import decode_mask
from sparseinst_jax.data.importers.mask_images import read_masks
from sparseinst_jax.data.importers.mask_values import parse_value

SIZE = (12, 16)


def _box(rows, columns, value=255, dtype=np.uint8):
    mask = np.zeros(SIZE, dtype)
    mask[slice(*rows), slice(*columns)] = value
    return mask


def _save(path, values, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(values).save(path, **options)


def _photo(tmp_path, name="a.jpg", size=SIZE):
    _save(tmp_path / "images" / name, np.zeros((*size, 3), np.uint8))


def _read(tmp_path, layout, **options):
    return read_masks(tmp_path / "masks", tmp_path / "images", layout=layout, **options)


def _decoded(found_object):
    return decode_mask(found_object.segmentation, *SIZE)


def test_an_image_for_each_object_with_the_class_from_folder_or_name(tmp_path):
    _photo(tmp_path)
    _photo(tmp_path, "s/b.png")
    _save(tmp_path / "masks/a/apple/1.png", _box((1, 3), (2, 7)))
    _save(tmp_path / "masks/a/red_pear_12.png", _box((4, 9), (0, 4), value=1))
    _save(tmp_path / "masks/s/b/apple-3.png", _box((0, 12), (0, 16)) > 0)  # one bit a pixel
    found = _read(tmp_path, "objects")
    assert found.faults.lines == []
    assert found.class_names == ("apple", "red_pear")
    assert [(i.file_name, i.height, i.width) for i in found.images] == [
        ("a.jpg", *SIZE),
        ("s/b.png", *SIZE),
    ]
    first, second = found.images[0].objects
    assert (first.class_name, first.area, first.bbox) == ("apple", 10, [2, 1, 5, 2])
    assert (second.class_name, second.area, second.bbox) == ("red_pear", 20, [0, 4, 4, 5])
    np.testing.assert_array_equal(_decoded(first), _box((1, 3), (2, 7)) > 0)
    assert set(first.segmentation) == {"size", "counts"}
    assert found.images[1].objects[0].area == 12 * 16


def test_one_class_for_all_needs_no_names_of_files(tmp_path):
    _photo(tmp_path)
    _photo(tmp_path, "empty.jpg")
    _save(tmp_path / "masks/a/9f3e.png", _box((1, 3), (2, 7)))
    _save(tmp_path / "masks/a/masks/10.png", _box((4, 6), (2, 7)))
    found = _read(tmp_path, "objects", class_name="nucleus")
    assert [o.class_name for o in found.images[0].objects] == ["nucleus", "nucleus"]
    assert found.notes == [f"1 images below {tmp_path / 'images'} have no mask: left out"]
    without = read_masks(tmp_path, layout="objects", class_name="nucleus")
    assert without.images == found.images


def test_masks_may_be_grey_colour_or_palette_images(tmp_path):
    _photo(tmp_path)
    drawn = _box((1, 3), (2, 7))
    coloured = np.zeros((*SIZE, 3), np.uint8)
    coloured[drawn > 0] = [0, 200, 30]
    palette = Image.fromarray(drawn // 255).convert("P")
    palette.putpalette([255, 255, 255, 0, 0, 0])  # the indices count, not the colours
    for name, image in (
        ("1", Image.fromarray(coloured)),
        ("2", Image.fromarray(np.dstack([coloured, np.full(SIZE, 255, np.uint8)]))),
        ("3", palette),
        ("4", Image.fromarray(drawn.astype(np.uint16) * 200)),
    ):
        (tmp_path / "masks/a/pear").mkdir(parents=True, exist_ok=True)
        image.save(tmp_path / f"masks/a/pear/{name}.png")
    found = _read(tmp_path, "objects")
    assert found.faults.lines == []
    assert len(found.images[0].objects) == 4
    for found_object in found.images[0].objects:
        np.testing.assert_array_equal(_decoded(found_object), drawn > 0)


def test_masks_that_cannot_be_read_are_told_with_their_file(tmp_path, rng):
    _photo(tmp_path)
    folder = tmp_path / "masks/a"
    _save(folder / "pear_1.png", _box((1, 3), (2, 7)))
    _save(folder / "pear_2.png", np.zeros(SIZE, np.uint8))
    _save(folder / "pear_3.png", _box((1, 3), (2, 7)).T.copy())
    _save(folder / "pear_4.png", _box((1, 3), (2, 7)) + _box((5, 6), (2, 7), 7))
    _save(folder / "pear_5.png", np.dstack([_box((1, 3), (2, 7))] * 4))
    (folder / "pear_6.png").write_bytes(b"not an image")
    _save(folder / "7.png", _box((1, 3), (2, 7)))
    _save(folder / "deadbeef7.png", _box((1, 3), (2, 7)))
    _save(tmp_path / "masks/other/pear_1.png", _box((1, 3), (2, 7)))
    found = _read(tmp_path, "objects")
    assert [o.area for o in found.images[0].objects] == [10]
    messages = {
        "a/pear_2.png": "covers no pixel",
        "a/pear_3.png": "the mask says 16 x 12 (height x width), the image is 12 x 16; it was made",
        "a/pear_4.png": "has 3 values (0, 7, 255), a mask of one object has 0 and one other",
        "a/pear_5.png": "is partly transparent",
        "a/pear_6.png": "cannot be read",
        "a/7.png": "the name says no class: expected a/apple_1.png or a/apple/1.png",
        "a/deadbeef7.png": "the name says no class",
        "other": "1 masks lie in no folder with the name of an image; those of",
    }
    assert len(found.faults.lines) == len(messages)
    for file, message in messages.items():
        (line,) = [x for x in found.faults.lines if x.startswith(f"{tmp_path / 'masks' / file}:")]
        assert message in line


def test_a_map_numbers_the_objects_and_values_json_names_their_classes(tmp_path):
    _photo(tmp_path)
    _photo(tmp_path, "s/b.jpg")
    first = _box((1, 3), (2, 7), 1) + _box((5, 9), (0, 4), 2) + _box((11, 12), (0, 16), 255)
    _save(tmp_path / "masks/a.png", first)
    _save(tmp_path / "masks/s/b.png", _box((0, 2), (0, 3), 40_000, np.uint16))
    values = {"a.png": {"1": "pear", "2": "apple", "255": None}, "s/b.png": {"40000": "pear"}}
    (tmp_path / "masks/values.json").write_text(json.dumps(values))
    found = _read(tmp_path, "indexed")
    assert found.faults.lines == []
    assert [[(o.class_name, o.area, o.bbox) for o in i.objects] for i in found.images] == [
        [("pear", 10, [2, 1, 5, 2]), ("apple", 16, [0, 5, 4, 4])],
        [("pear", 6, [0, 0, 3, 2])],
    ]
    np.testing.assert_array_equal(_decoded(found.images[0].objects[1]), first == 2)


def test_each_colour_or_palette_index_of_a_map_is_an_object(tmp_path):
    _photo(tmp_path)
    _photo(tmp_path, "b.jpg")
    coloured = np.zeros((*SIZE, 3), np.uint8)
    coloured[1:3, 2:7] = [10, 0, 0]
    coloured[5:9, 0:4] = [0, 10, 0]
    _save(tmp_path / "masks/a.png", coloured)
    palette = Image.fromarray(_box((1, 3), (2, 7), 1) + _box((5, 9), (0, 4), 2)).convert("P")
    palette.putpalette([0, 0, 0, 90, 90, 90, 90, 90, 90])  # two objects of one colour
    palette.save(tmp_path / "masks/b.png")
    found = _read(tmp_path, "indexed", class_name="pear")
    for image in found.images:
        assert [o.area for o in image.objects] == [10, 16]


def test_maps_with_faults_are_told(tmp_path, rng):
    for name in ("a.jpg", "b.jpg", "c.jpg"):
        _photo(tmp_path, name)
    _photo(tmp_path, "noise.png", (64, 64))
    _save(tmp_path / "masks/a.png", _box((1, 3), (2, 7), 1) + _box((5, 9), (0, 4), 2))
    _save(tmp_path / "masks/b.png", np.ones((6, 8), np.uint8))
    _save(tmp_path / "masks/d.png", _box((1, 3), (2, 7), 1))
    _save(tmp_path / "masks/noise.png", rng.integers(0, 255, (64, 64, 3), np.uint8))
    (tmp_path / "masks/values.json").write_text('{"a.png": {"1": "pear"}}')
    found = _read(tmp_path, "indexed")
    assert [[o.class_name for o in image.objects] for image in found.images] == [["pear"]]
    messages = (
        "a.png, value 2: values.json does not say its class",
        "b.png: the map says 6 x 8 (height x width), the image is 12 x 16; label this very file",
        "d.png: there is no image d below",
        "different values: a photo, or a mask that was smoothed",
    )
    assert len(found.faults.lines) == len(messages)
    for line, message in zip(found.faults.lines, messages, strict=True):
        assert message in line


def test_semantic_maps_are_refused_with_the_reason(tmp_path):
    for name in "abc":
        _photo(tmp_path, f"{name}.jpg")
        parts = _box((1, 3), (2, 7), 1) + _box((5, 9), (0, 4), name != "c")
        _save(tmp_path / f"masks/{name}.png", parts)
    with pytest.raises(ValueError, match=r"one value besides 0 \(1\), and in 2 of 3.*semantic"):
        _read(tmp_path, "indexed", class_name="pear")
    (tmp_path / "masks/values.json").write_text('{"1": "pear", "2": "apple"}')
    with pytest.raises(ValueError, match=r"for all maps at once, which is a semantic map"):
        _read(tmp_path, "indexed")
    _save(tmp_path / "masks/a.png", _box((1, 3), (2, 7), 1) + _box((5, 9), (0, 4), 2))
    found = _read(tmp_path, "indexed", class_name="pear")  # now it numbers objects
    assert [len(image.objects) for image in found.images] == [2, 1, 1]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, r"the classes of the objects are unknown.*--class NAME.*values\.json"),
        ("[1]", "expected an object like"),
        ("{", "cannot be read as json"),
        ('{"a.png": 3}', "entry 'a.png' is no object"),
    ],
)
def test_a_values_json_that_cannot_be_read_is_refused(tmp_path, text, message):
    _photo(tmp_path)
    _save(tmp_path / "masks/a.png", _box((1, 3), (2, 7), 1))
    if text is not None:
        (tmp_path / "masks/values.json").write_text(text)
    with pytest.raises(ValueError, match=message):
        _read(tmp_path, "indexed")


def test_folders_that_do_not_fit_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="the folder of the masks"):
        _read(tmp_path, "objects")
    (tmp_path / "masks").mkdir()
    with pytest.raises(ValueError, match=r"does not hold the folders images and masks.*--images"):
        read_masks(tmp_path, layout="objects")
    (tmp_path / "images").mkdir()
    with pytest.raises(ValueError, match="no mask image"):
        _read(tmp_path, "objects")
    _save(tmp_path / "masks/a/pear_1.png", _box((1, 3), (2, 7)))
    with pytest.raises(ValueError, match="no image in or below"):
        _read(tmp_path, "objects")
    _photo(tmp_path, "a.jpg")
    _photo(tmp_path, "a.png")
    (fault,) = _read(tmp_path, "objects").faults.lines
    assert "a.jpg has the same name except for the suffix" in fault


def test_masks_may_lie_below_the_images_or_images_below_the_masks(tmp_path):
    _save(tmp_path / "a.jpg", np.zeros((*SIZE, 3), np.uint8))
    _save(tmp_path / "masks/a.png", _box((1, 3), (2, 7), 1))
    found = read_masks(tmp_path / "masks", tmp_path, layout="indexed", class_name="pear")
    assert [(i.file_name, len(i.objects)) for i in found.images] == [("a.jpg", 1)]
    assert (found.notes, found.faults.lines) == ([], [])
    other = tmp_path / "other"
    _save(other / "photos/a.jpg", np.zeros((*SIZE, 3), np.uint8))
    _save(other / "a/pear_1.png", _box((1, 3), (2, 7), 1))
    found = read_masks(other, other / "photos", layout="objects")
    assert [(i.file_name, len(i.objects)) for i in found.images] == [("a.jpg", 1)]


@pytest.mark.parametrize(("layout", "mask"), [("objects", "a/pear_1.png"), ("indexed", "a.png")])
def test_a_wrong_image_folder_is_recognised_and_the_right_one_named(tmp_path, layout, mask):
    _photo(tmp_path, "train/a.jpg")
    _save(tmp_path / "masks" / mask, _box((1, 3), (2, 7), 1))
    (fault,) = _read(tmp_path, layout, class_name="pear").faults.lines
    assert fault.endswith(f"is --images {tmp_path / 'images' / 'train'} meant?")


def _refused(tmp_path, layout="indexed", **options):
    (line,) = _read(tmp_path, layout, class_name="pear", **options).faults.lines
    return line


def _two_objects():
    drawn = np.zeros((64, 80), np.uint8)
    drawn[5:30, 10:40], drawn[35:60, 30:70] = 100, 200
    return drawn


@pytest.mark.parametrize("layout", ["indexed", "objects"])
@pytest.mark.parametrize(
    ("suffix", "options"), [("jpg", {"quality": 100}), ("webp", {"quality": 95}), ("jp2", {})]
)
def test_masks_in_a_lossy_format_are_refused(tmp_path, layout, suffix, options):
    _photo(tmp_path, size=(64, 80))
    name = f"a.{suffix}" if layout == "indexed" else f"a/1.{suffix}"
    _save(tmp_path / "masks" / name, np.dstack([_two_objects()] * 3), **options)
    assert "a format that changes values; save the values as PNG" in _refused(tmp_path, layout)


def test_lossless_webp_is_read(tmp_path):
    _photo(tmp_path, size=(64, 80))
    _save(tmp_path / "masks/a.webp", np.dstack([_two_objects()] * 3), lossless=True)
    (image,) = _read(tmp_path, "indexed", class_name="pear").images
    assert [found.area for found in image.objects] == [25 * 30, 25 * 40]


@pytest.mark.parametrize("factor", [0.5, 0.7, 2, 3.3])
@pytest.mark.parametrize("how", [Image.Resampling.BILINEAR, Image.Resampling.LANCZOS])
def test_smoothed_maps_are_refused_and_those_resized_by_nearest_neighbour_read(
    tmp_path, factor, how
):
    size = round(80 * factor), round(64 * factor)
    _photo(tmp_path, size=size[::-1])
    drawn = Image.fromarray(_two_objects())
    _save(tmp_path / "masks/a.png", np.array(drawn.resize(size, how)))
    assert "only in thin lines around the others: a map that was smoothed" in _refused(tmp_path)
    _save(tmp_path / "masks/a.png", np.array(drawn.resize(size, Image.Resampling.NEAREST)))
    (image,) = _read(tmp_path, "indexed", class_name="pear").images
    assert len(image.objects) == 2


def test_a_map_of_thin_and_tiny_objects_is_no_smoothed_one(tmp_path):
    _photo(tmp_path, size=(64, 80))
    drawn = _two_objects()
    drawn[2, 2:70] = 7  # a wire
    drawn[20:22, 50:52] = 8
    drawn[30:35, 20] = 9  # between the two
    _save(tmp_path / "masks/a.png", drawn)
    (image,) = _read(tmp_path, "indexed", class_name="pear").images
    assert [found.area for found in image.objects] == [68, 4, 5, 25 * 30, 25 * 40]


def _png_of_16_bits(values, colour_type):
    """A PNG with 16 bits a channel, which Pillow reads but does not write."""
    height, width = values.shape[:2]
    rows = values.astype(">u2").reshape(height, -1)
    raw = b"".join(b"\0" + row.tobytes() for row in rows)

    def chunk(kind, body):
        return (
            struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
        )

    head = struct.pack(">IIBBBBB", width, height, 16, colour_type, 0, 0, 0)
    signature = b"\x89PNG\r\n\x1a\n"
    chunks = (b"IHDR", head), (b"IDAT", zlib.compress(raw)), (b"IEND", b"")
    return signature + b"".join(chunk(*part) for part in chunks)


@pytest.mark.parametrize(("channels", "colour_type"), [(2, 4), (3, 2), (4, 6)])
def test_16_bits_a_channel_are_refused_not_cut_to_8(tmp_path, channels, colour_type):
    _photo(tmp_path)
    numbers = _box((1, 3), (2, 7), 257, np.uint16) + _box((5, 9), (0, 4), 258, np.uint16)
    values = np.repeat(numbers[..., None], channels, axis=2)
    (tmp_path / "masks").mkdir()
    (tmp_path / "masks/a.png").write_bytes(_png_of_16_bits(values, colour_type))
    assert "several channels of 16 bits, of which only 8 can be read" in _refused(tmp_path)
    (tmp_path / "masks/a.png").write_bytes(_png_of_16_bits(numbers, 0))
    (image,) = _read(tmp_path, "indexed", class_name="pear").images
    assert [found.area for found in image.objects] == [10, 16]


@pytest.mark.parametrize("suffix", ["tif", "gif"])
def test_a_file_of_several_pages_is_refused(tmp_path, suffix):
    _photo(tmp_path)
    pages = [Image.fromarray(_box((1, 3), (2, 7), 1)), Image.fromarray(_box((5, 9), (0, 4), 2))]
    (tmp_path / "masks").mkdir()
    pages[0].save(tmp_path / f"masks/a.{suffix}", save_all=True, append_images=pages[1:])
    assert "has 2 pages, of which one can be read" in _refused(tmp_path)


def test_names_of_images_are_not_taken_for_classes(tmp_path):
    for name in ("IMG_1", "IMG_2"):
        _photo(tmp_path, f"{name}.jpg")
        _save(tmp_path / f"masks/{name}/{name}_1.png", _box((1, 3), (2, 7)))
        _save(tmp_path / f"masks/{name}/{name}_mask_2.png", _box((5, 9), (0, 4)))
    with pytest.raises(ValueError, match=r"begin with those of their images.*--class NAME"):
        _read(tmp_path, "objects")
    found = _read(tmp_path, "objects", class_name="pear")
    assert [len(image.objects) for image in found.images] == [2, 2]
    _save(tmp_path / "masks/IMG_2/apple_1.png", _box((5, 9), (0, 4)))  # names that say a class
    assert "apple" in _read(tmp_path, "objects").class_names


def test_semantic_maps_of_several_classes_are_refused(tmp_path):
    for name in "ab":
        _photo(tmp_path, f"{name}.jpg")
        parts = _box((1, 3), (2, 7), 1) + _box((5, 9), (0, 4), 1)
        parts += _box((1, 4), (10, 13), 2) + _box((6, 9), (10, 13), 2)
        _save(tmp_path / f"masks/{name}.png", parts)
    with pytest.raises(ValueError, match=r"of 4 values in 2 maps 4 lie in several separate parts"):
        _read(tmp_path, "indexed", class_name="pear")
    classes = {"1": "pear", "2": "apple"}
    values = {"a.png": classes, "b.png": classes}
    (tmp_path / "masks/values.json").write_text(json.dumps(values))
    (note,) = _read(tmp_path, "indexed").notes
    assert note.startswith("WARNING: ") and "they look semantic" in note


def test_specks_make_no_map_semantic(tmp_path):
    _photo(tmp_path)
    drawn = _box((1, 6), (1, 7), 1) + _box((1, 6), (9, 15), 2)
    drawn[9, 3], drawn[9, 12] = 1, 2
    _save(tmp_path / "masks/a.png", drawn)
    (image,) = _read(tmp_path, "indexed", class_name="pear").images
    assert [found.area for found in image.objects] == [31, 31]


def test_a_border_value_can_be_left_out_and_is_recognised(tmp_path):
    _photo(tmp_path, size=(64, 80))
    drawn = _two_objects()
    for thickness, expected in ((1, None), (5, "WARNING: the value 255 lies around all other obj")):
        grown = ndimage.maximum_filter(drawn > 0, 2 * thickness + 1) & (drawn == 0)
        _save(tmp_path / "masks/a.png", np.where(grown, 255, drawn).astype(np.uint8))
        if expected is None:
            assert _refused(tmp_path).endswith("leave them out: --ignore-value 255")
        else:
            (note,) = _read(tmp_path, "indexed", class_name="pear").notes
            assert note.startswith(expected) and note.endswith("--ignore-value 255")
        found = _read(tmp_path, "indexed", class_name="pear", ignored=[255])
        assert [o.area for o in found.images[0].objects] == [25 * 30, 25 * 40]
        assert found.notes == []
        values = {"a.png": {"100": "pear", "200": "apple", "255": None}}
        (tmp_path / "masks/values.json").write_text(json.dumps(values))
        assert [o.class_name for o in _read(tmp_path, "indexed").images[0].objects] == [
            "pear",
            "apple",
        ]
        (tmp_path / "masks/values.json").unlink()
    assert parse_value("224,224,192") == 224 + 256 * 224 + 256**2 * 192 and parse_value("7") == 7


def test_two_maps_of_one_image_are_a_fault(tmp_path):
    _photo(tmp_path)
    for name in ("a.png", "a.tif"):
        _save(tmp_path / "masks" / name, _box((1, 3), (2, 7), value=1) + _box((5, 7), (2, 7), 2))
    found = _read(tmp_path, "indexed", class_name="apple")
    (fault,) = found.faults.lines
    assert "a.tif: is a map of" in fault and "a.png is; keep one of them" in fault
    assert len(found.images) == 1
