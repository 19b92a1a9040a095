"""The walk through folders, and names that almost fit."""

import json
import os
import unicodedata
from types import SimpleNamespace

import pytest

from sparseinst_jax.cli.predict import list_images
from sparseinst_jax.data.coco import index_coco
from sparseinst_jax.data.file_search import FileNames, FileSearch
from sparseinst_jax.evaluation.evaluator import predict_dataset


def _files(folder, *names):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"x")
    return folder


def _found(search, folder, suffixes=frozenset({".jpg"})):
    return [str(path.relative_to(folder)) for path in search.find(folder, suffixes)]


def test_files_are_found_in_the_order_of_their_paths_whatever_the_case_of_their_ending(tmp_path):
    _files(tmp_path, "b.jpg", "a/c.JPG", "a.txt", "z/y/x.Jpg")
    search = FileSearch()
    assert _found(search, tmp_path) == ["a/c.JPG", "b.jpg", "z/y/x.Jpg"]
    assert search.left_out() == []


def test_hidden_files_and_those_that_systems_make_are_left_out_and_told(tmp_path):
    hidden = ("._a.jpg", ".thumbnails/a.jpg", ".ipynb_checkpoints/a.jpg", "s/@eaDir/a.jpg/x.jpg")
    _files(tmp_path, "a.jpg", "__MACOSX/s/._a.jpg", *hidden, ".git/config", "s/._notes.txt")
    search = FileSearch()
    assert _found(search, tmp_path) == ["a.jpg"]
    (line,) = search.left_out()
    assert line.startswith("left out, hidden or made by the system: 5: ")
    assert f"{tmp_path / '.thumbnails'}" in line and "git" not in line and "notes" not in line
    # A folder that is named is meant, hidden or not.
    assert _found(FileSearch(), tmp_path / ".thumbnails") == ["a.jpg"]


def test_pictures_that_are_not_read_are_told_where_pictures_are_looked_for(tmp_path):
    _files(tmp_path, "a.jpg", "b.DNG", "c.mp4", ".d.mp4", "notes.txt")
    search = FileSearch()
    assert _found(search, tmp_path) == ["a.jpg"]
    (line,) = search.left_out()
    assert line.startswith("WARNING: left out, pictures and films of a kind that is not read: 2: ")
    assert _found(labels := FileSearch(), tmp_path, {".txt"}) == ["notes.txt"]
    assert labels.left_out() == []


def test_links_to_folders_are_left_out_and_told_or_followed_once(tmp_path):
    store = _files(tmp_path / "store", "b.jpg", "deep/c.jpg")
    photos = _files(tmp_path / "photos", "a.jpg", "own/d.jpg")
    for name, target in (("linked", store), ("again", store), ("up", tmp_path), ("in", "own")):
        (photos / name).symlink_to(target)
    (store / "back").symlink_to(photos)
    search = FileSearch()
    assert _found(search, photos) == ["a.jpg", "own/d.jpg"]
    (line,) = search.left_out()
    assert line.startswith("WARNING: left out, links to other folders: 3: ")
    assert f"{photos / 'linked'} -> {store}" in line and "copy their files into it" in line
    followed = FileSearch(follows_links=True)
    assert _found(followed, photos) == ["a.jpg", "again/b.jpg", "again/deep/c.jpg", "own/d.jpg"]
    (line,) = followed.left_out()
    assert f"1: {photos / 'up'} -> {tmp_path}" in line


def test_links_that_lead_nowhere_and_folders_that_cannot_be_opened_are_told(tmp_path, monkeypatch):
    _files(tmp_path, "a.jpg", "closed/b.jpg")
    (tmp_path / "c.jpg").symlink_to("gone.jpg")
    scan = os.scandir

    def refuse(path):
        if str(path).endswith("closed"):
            raise PermissionError(13, "Permission denied", str(path))
        return scan(path)

    monkeypatch.setattr(os, "scandir", refuse)
    search = FileSearch()
    assert _found(search, tmp_path) == ["a.jpg"]
    assert sorted(search.left_out()) == [
        f"WARNING: left out, cannot be opened: 1: {tmp_path / 'closed'} (Permission denied)",
        f"WARNING: left out, links that lead nowhere: 1: {tmp_path / 'c.jpg'}",
    ]


def test_predict_takes_what_is_named_and_says_what_it_left_out(tmp_path):
    photos = _files(tmp_path / "photos", "a.jpg", "._a.jpg", ".thumbnails/a.jpg", "out/old.png")
    (photos / "linked").symlink_to(_files(tmp_path / "store", "b.PNG"))
    found, left_out = list_images([photos, photos / "._a.jpg"], photos / "out")
    names = [str(path).removeprefix(f"{photos}/") for path in found]
    assert names == ["a.jpg", "linked/b.PNG", "._a.jpg"]
    assert len(left_out) == 1 and "hidden or made by the system: 2" in left_out[0]
    with pytest.raises(ValueError, match=r"no image in .*give image files.*hidden or made.*1: "):
        list_images([_files(tmp_path / "empty", "._x.jpg")], tmp_path / "out")


@pytest.mark.parametrize(
    ("there", "wanted", "hint"),
    [
        ("sub/0.jpg", "sub\\0.jpg", r"differs in \ in place of /"),
        ("my photo 0.jpg", "my%20photo%200.jpg", "differs in codes such as %20"),
        ("0.JPG", "0.jpg", "differs in capital letters"),
        (unicodedata.normalize("NFD", "café.jpg"), "café.jpg", "the way accents are stored"),
        ("my photo.jpg", "my_photo.jpg", "differs in spaces or _"),
        ("Sub/A b.JPG", "sub\\a%20b.jpg", r"\ in place of / and codes such as %20 and capital"),
        ("train/a.jpg", "a.jpg", "was another folder meant?"),
        ("b.jpg", "photos/b.jpg", "is the folder that holds photos meant?"),
        ("a.png", "a.jpg", "it has another ending"),
        ("b.png", "a.jpg", ""),
    ],
)
def test_what_a_missing_file_may_be_called_is_said_with_what_differs(tmp_path, there, wanted, hint):
    photos = _files(tmp_path / "photos", there)
    found = FileNames(photos).hint(wanted)
    assert hint in found
    assert found == "" if not hint else found.startswith(f"; there is {photos / there}: ")


def _json(folder, *names):
    images = [{"id": i, "file_name": n, "height": 9, "width": 9} for i, n in enumerate(names)]
    content = {"images": images, "annotations": [], "categories": [{"id": 1, "name": "cat"}]}
    (folder / "a.json").write_text(json.dumps(content))
    return folder / "a.json"


def test_a_wholly_wrong_image_folder_is_one_line_with_the_right_one(tmp_path):
    photos = _files(tmp_path / "photos", "train/1.jpg", "train/2.jpg")
    path = _json(tmp_path, "1.jpg", "2.jpg")
    dataset, faults = index_coco(path, photos, check_files=True)
    (fault,) = faults
    assert fault.message == (
        f"none of the 2 image files is in {photos}, which holds 2 file(s): {photos / '1.jpg'} does "
        f"not exist; there is {photos / 'train/1.jpg'}: was another folder meant?"
    )
    predictor = SimpleNamespace(class_names=("cat",))
    with pytest.raises(FileNotFoundError, match=r"(?s)2 of 2 .*train/1.jpg: was") as error:
        predict_dataset(predictor, dataset)
    assert "2.jpg" not in str(error.value)
    dataset, faults = index_coco(path, _files(photos / "train", "1.jpg"), check_files=True)
    assert list(faults) == []
    (photos / "train/1.jpg").rename(photos / "train/1.JPG")
    _, faults = index_coco(path, photos / "train", check_files=True)
    (fault,) = faults
    assert fault.message.startswith("image 0: the file") and "capital letters" in fault.message
