"""VIA labels: the json project or the json export of the VGG Image Annotator 2.

Source: the file format of VIA 2.x, www.robots.ox.ac.uk/~vgg/software/via.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path, PureWindowsPath
from typing import Any

from sparseinst_jax.data.file_search import FileNames, FileSearch
from sparseinst_jax.data.importers.coco_content import found_classes
from sparseinst_jax.data.importers.objects import (
    Imported,
    ImportFaults,
    LabelFault,
    LabelledImage,
    LabelledObject,
    checked_class,
    checked_number,
    files_by_name,
    is_coco,
    list_images,
    make_box,
    make_ellipse,
    make_object,
    make_polygon,
    open_image,
    read_json,
    require_folder,
    with_progress,
)


def read_via(
    source: Path,
    images_dir: Path | None = None,
    names: Sequence[str] | None = None,
    *,
    attribute: str | None = None,
    class_name: str | None = None,
) -> Imported:
    """Read a VIA project or export.

    Polygons, polylines (closed), rectangles, circles and ellipses are objects, with a region
    attribute's value as class; of a checkbox the one option that is ticked.

    Args:
        source: the json file.
        images_dir: folder of the images; by default that of the json. A file that is not there
            is looked for below it where one image has that name.
        names: the classes in their order; by default those found, by the alphabet.
        attribute: region attribute that holds the class; by default the only one there is.
        class_name: class of every region, in place of an attribute.

    Raises:
        FileNotFoundError: the json or the folder is missing.
        ValueError: the file is no VIA json, or the attribute is not clear.
    """
    if not source.is_file():
        raise FileNotFoundError(
            f"the VIA json {source} does not exist or is no file; give the file"
        )
    root = source.parent if images_dir is None else images_dir
    require_folder(root, "the image folder")
    try:
        content = read_json(source)
        entries = _entries(content)
    except LabelFault as fault:
        raise ValueError(f"{source}: {fault}") from fault
    if class_name is None:
        attribute = _choose_attribute(entries, attribute, source)
    options = _options(content, attribute)
    faults = ImportFaults()
    search = FileSearch()
    by_name = files_by_name(list_images(root, search))
    images: list[LabelledImage] = []
    known, seen = FileNames(root), set[str]()
    for key in with_progress(entries):
        entry = entries[key]
        with faults.at(f"{source}: {_name_of(entry) or key}"):
            image = open_image(_image_path(entry, root, by_name), root, known=known)
            if image.file_name in seen:
                raise LabelFault("the file is listed twice; keep one of the entries")
            seen.add(image.file_name)
            size = image.height, image.width
            for number, region in _regions(entry):
                with faults.at(f"{source}: {image.file_name}, region {number}"):
                    label = class_name or _label(region, attribute, options)
                    image.objects.append(_read_region(region, checked_class(label, names), size))
            images.append(image)
    result = Imported(images, found_classes(images, names), root, faults, search.left_out())
    result.notes += _origin(attribute, options, result.class_names)
    return result


def _origin(attribute: str | None, options: Mapping[str, str], names: Sequence[str]) -> list[str]:
    """Lines on where the classes are from."""
    if attribute is None:
        return []
    named = ", by the names of its options" if options else ""
    lines = [f"the class is the region attribute {attribute!r}{named}"]
    if len(set(options.values())) < len(options):
        lines.append(
            f"WARNING: options of {attribute!r} that have one name are one class: {options}"
        )
    if not options and names and all(name.isdigit() for name in names):
        lines.append(
            "WARNING: all classes are numbers, perhaps of a dropdown's options: their names are in "
            "the project (Project > Save), not in an export; import the project"
        )
    return lines


def _entries(content: Any) -> dict[str, dict]:
    """The entries of the images: in a project under one key, in an export all there is."""
    if isinstance(content, dict) and isinstance(content.get("_via_img_metadata"), dict):
        content = content["_via_img_metadata"]
    if isinstance(content, dict) and {"project", "metadata", "view"} <= content.keys():
        raise LabelFault("is a project of VIA 3; expected VIA 2: export the regions for VIA 2")
    if is_coco(content):
        raise LabelFault("is a COCO json already; train on it, or see `sparseinst check-data`")
    is_via = isinstance(content, dict) and all(
        isinstance(entry, dict) and "regions" in entry for entry in content.values()
    )
    if not is_via:
        raise LabelFault(
            "is not a VIA json; expected a saved project, or an export by Annotation > Export "
            "Annotations (as json): an object with a filename and regions for each image"
        )
    if not content:
        raise LabelFault("has no images; add some to the project and export it again")
    return content


def _regions(entry: dict) -> list[tuple[str, Any]]:
    """Number and content of the regions, a list in VIA 2 and an object in VIA 1."""
    regions = entry["regions"]
    if isinstance(regions, dict):
        return [(str(number), region) for number, region in regions.items()]
    if isinstance(regions, list):
        return [(str(number), region) for number, region in enumerate(regions)]
    raise LabelFault(f"regions must be a list or an object, got a {type(regions).__name__}")


def _attributes(region: Any) -> dict[str, Any]:
    found = region.get("region_attributes") if isinstance(region, dict) else None
    return found if isinstance(found, dict) else {}


def _choose_attribute(entries: dict[str, dict], wanted: str | None, source: Path) -> str:
    """The attribute that holds the class."""
    used: dict[str, int] = {}
    num_regions = 0
    for entry in entries.values():
        try:
            regions = _regions(entry)
        except LabelFault:  # reported with its image when that is read
            continue
        for _, region in regions:
            num_regions += 1
            for name, value in _attributes(region).items():
                used[name] = used.get(name, 0) + (value not in ("", {}, None))
    listed = ", ".join(f"{name!r} ({used[name]} of {num_regions})" for name in sorted(used))
    if wanted is not None:
        if wanted in used:
            return wanted
        raise ValueError(
            f"{source}: no region has the attribute {wanted!r}; those with a value are: "
            f"{listed or 'none'}. Give one of them as --attribute, or --class NAME"
        )
    filled = [name for name in used if used[name]]
    if len(filled) == 1:
        return filled[0]
    if not filled:
        raise ValueError(
            f"{source}: none of the {num_regions} regions has an attribute with a value, so "
            "nothing says its class; set one in VIA, or give --class NAME if all are of one class"
        )
    raise ValueError(
        f"{source}: several region attributes may hold the class: {listed}; choose one by "
        "--attribute NAME"
    )


def _options(content: Any, attribute: str | None) -> dict[str, str]:
    """What a project calls the options of a dropdown, radio or checkbox; a value is their key."""
    found = content
    for key in ("_via_attributes", "region", attribute, "options"):
        found = found.get(key) if isinstance(found, dict) else None
    if not isinstance(found, dict):
        return {}
    return {key: name for key, name in found.items() if isinstance(name, str) and name.strip()}


def _label(region: Any, attribute: str | None, options: Mapping[str, str]) -> Any:
    """The value of the attribute by its name; of a checkbox the option that is ticked."""
    value = _attributes(region).get(attribute or "")
    if isinstance(value, dict):
        ticked = [name for name, is_ticked in value.items() if is_ticked in (True, "true")]
        if len(ticked) != 1:
            raise LabelFault(
                f"attribute {attribute!r} must have one option ticked, got {ticked}; tick one"
            )
        value = ticked[0]
    if value in (None, ""):
        raise LabelFault(f"has no value for the attribute {attribute!r}; set it in VIA")
    return options.get(str(value), value)


def _name_of(entry: dict) -> str:
    name = entry.get("filename")
    return name.strip() if isinstance(name, str) else ""


def _image_path(entry: dict, root: Path, by_name: dict[str, Path]) -> Path:
    """The image of an entry: by its path in the folder, then by its name anywhere below it."""
    name = _name_of(entry)
    if not name:
        raise LabelFault(f"filename must name the image, got {entry.get('filename')!r}")
    if "://" in name or name.startswith("data:"):
        raise LabelFault("is an address, not a file; download the image and name the file instead")
    relative = PureWindowsPath(name)  # knows both kinds of slashes
    path = root / (relative.name if relative.root else relative.as_posix())
    return path if path.is_file() else by_name.get(relative.name, path)


def _read_region(region: Any, class_name: str, size: tuple[int, int]) -> LabelledObject:
    shape = region.get("shape_attributes") if isinstance(region, dict) else None
    if not isinstance(shape, dict):
        raise LabelFault("has no shape_attributes; draw it again")
    kind = shape.get("name")

    def number(*keys: str) -> list[float]:
        return [checked_number(shape.get(key), f"{key} of a {kind}") for key in keys]

    if kind in ("polygon", "polyline"):
        xs, ys = (shape.get(key) for key in ("all_points_x", "all_points_y"))
        if not isinstance(xs, list) or not isinstance(ys, list) or len(xs) != len(ys):
            raise LabelFault("all_points_x and all_points_y must be lists of one length")
        columns = [checked_number(x, "all_points_x") for x in xs]
        rows = [checked_number(y, "all_points_y") for y in ys]
        polygon = make_polygon(columns, rows, size, kind)
    elif kind == "rect":
        polygon = make_box(number("x", "y", "width", "height"), size)
    elif kind == "circle":
        x, y, radius = number("cx", "cy", "r")
        polygon = make_ellipse((x, y), (radius, radius), size)
    elif kind == "ellipse":
        x, y, radius_x, radius_y = number("cx", "cy", "rx", "ry")
        angle = checked_number(shape.get("theta", 0), "theta of an ellipse")
        polygon = make_ellipse((x, y), (radius_x, radius_y), size, angle)
    elif kind == "point":
        raise LabelFault("a point has no area; draw a polygon, or delete it")
    else:
        raise LabelFault(
            f"shape {kind!r} is not read; expected polygon, polyline, rect, circle or ellipse"
        )
    return make_object(class_name, [polygon], size)
