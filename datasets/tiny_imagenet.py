"""Tiny-ImageNet, from its archive or the folder that it unpacks to; 64x64 JPEG files."""

import os

from datasets.archive import list_files, read_lines
from datasets.spec import RawSet
from runtime.errors import UserError, first_line

# The address and MD5 sum are unconfirmed: the download has not been tried yet.
ARCHIVE, MD5 = "tiny-imagenet-200.zip", "90528d7ca1a48142e341f4ef8d21d0de"
URL = f"http://cs231n.stanford.edu/{ARCHIVE}"
ANNOTATIONS = "val/val_annotations.txt"


def read(path, download, with_pool):
    """Names of files; the validation images are the test part, the test images the pool.

    The classes are those of wnids.txt, sorted: 200, but an archive of fewer is read too.
    """
    source = find(path, download)
    files = list_files(source)
    found = [file for file in files if f"/{file}".endswith(f"/{ANNOTATIONS}")]
    if len(found) != 1:
        raise UserError(f"{source}: holds no {ANNOTATIONS}, so it is not Tiny-ImageNet")
    root = found[0].removesuffix(ANNOTATIONS)  # 'tiny-imagenet-200/' in the archive
    train, pool, known = {}, [], set(files)
    for file in files:
        folders = file.removeprefix(root).split("/")
        if len(folders) == 4 and (folders[0], folders[2]) == ("train", "images"):
            train.setdefault(folders[1], []).append(file)
        elif folders[:2] == ["test", "images"] and len(folders) == 3:
            pool.append(file)
    wnids = sorted(train)
    if f"{root}wnids.txt" in known:
        wnids = sorted({line.strip() for line in read_lines(source, f"{root}wnids.txt")} - {""})
    for wnid in wnids:
        if wnid not in train:
            raise UserError(f"{source}: no images in train/{wnid}/images, but wnids.txt lists it")
    test = annotated(source, root, wnids, known)
    words = read_lines(source, f"{root}words.txt") if f"{root}words.txt" in known else []
    by_class = [{c: sorted(part[wnid]) for c, wnid in enumerate(wnids)} for part in (train, test)]
    return RawSet(*by_class, class_names(wnids, words), sorted(pool), source)


def find(path, download):
    """The archive, or the folder that it unpacks to, in `path` or as `path`; else downloaded."""
    for source in (path, path / ARCHIVE, path / ARCHIVE.removesuffix(".zip")):
        if source.is_file() or (source / ANNOTATIONS).is_file():
            return source
    if not download:
        raise UserError(
            f"--raw {path}: found neither {ARCHIVE} nor its folder (with {ANNOTATIONS}); put it "
            f"there, or name it"
        )
    from torchvision.datasets.utils import download_url  # slow, see cifar.py

    part = path / f"{ARCHIVE}.part"
    try:
        download_url(URL, path, part.name, MD5)
        os.replace(part, path / ARCHIVE)  # never half-written under its own name
    except (OSError, RuntimeError) as error:
        part.unlink(missing_ok=True)
        raise UserError(
            f"Tiny-ImageNet cannot be downloaded ({first_line(error)}); put {ARCHIVE} into "
            f"{path}, or name it with --raw FILE"
        ) from None
    return path / ARCHIVE


def annotated(source, root, wnids, known):
    """The validation images of each class: {wnid: names}; known: all names in the archive."""
    found = {wnid: [] for wnid in wnids}
    for line in read_lines(source, root + ANNOTATIONS):
        file, wnid, *_ = [*line.split("\t"), ""]
        if wnid in found:
            if (name := f"{root}val/images/{file}") not in known:
                raise UserError(f"{source}: {name} is missing, but val_annotations.txt lists it")
            found[wnid].append(name)
    return found


def class_names(wnids, lines):
    """{class id: first word of words.txt}; where two classes share it, their wnids."""
    words = {}
    for line in lines:
        wnid, _, rest = line.partition("\t")
        words[wnid] = rest.partition(",")[0]
    names = [words.get(wnid, wnid) for wnid in wnids]
    return {c: n if names.count(n) == 1 else wnids[c] for c, n in enumerate(names)}
