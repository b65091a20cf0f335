"""Tiny-ImageNet, from its archive or the folder that it unpacks to; 64x64 JPEG files."""

from datasets.files import download_file, list_files
from datasets.images import is_image
from datasets.spec import RawSet
from runtime.errors import UserError, first_line

# The address and MD5 sum are unconfirmed: the download has not been tried yet.
ARCHIVE, MD5 = "tiny-imagenet-200.zip", "90528d7ca1a48142e341f4ef8d21d0de"
URL = f"http://cs231n.stanford.edu/{ARCHIVE}"
ANNOTATIONS = "val/val_annotations.txt"


def read(path, download, with_pool):
    """Names of files; the validation images are the test split, the test images the pool.

    The classes are those of wnids.txt, sorted: 200, but an archive of fewer is read too.
    """
    for source in (path, path / ARCHIVE, path / ARCHIVE.removesuffix(".zip")):
        if source.is_file() or (source / ANNOTATIONS).is_file():
            break
    else:
        source = path / ARCHIVE
        if not download:
            raise UserError(f"--raw {path}: has neither {ARCHIVE} nor its folder; put one there")
        download_file(URL, source, MD5)
    files = list_files(source)
    found = [name for name in files if f"/{name}".endswith(f"/{ANNOTATIONS}")]
    if len(found) != 1:
        raise UserError(f"{source}: has no {ANNOTATIONS}, so it is not Tiny-ImageNet")
    root = found[0].removesuffix(ANNOTATIONS)  # 'tiny-imagenet-200/' in the archive
    files = {name.removeprefix(root): file for name, file in files.items()}
    wnids = sorted({*filter(None, read_lines(source, files, "wnids.txt"))})
    train, test, pool = {wnid: [] for wnid in wnids}, {wnid: [] for wnid in wnids}, []
    for name in filter(is_image, files):
        top, *folders, _ = name.split("/")
        if top == "train" and folders[1:] == ["images"] and folders[0] in train:
            train[folders[0]].append(name)
        elif (top, folders) == ("test", ["images"]):
            pool.append(name)
    for line in read_lines(source, files, ANNOTATIONS):
        name, wnid, *_ = [*line.split("\t"), ""]
        if wnid in test:
            test[wnid].append(f"val/images/{name}")
            if test[wnid][-1] not in files:
                raise UserError(f"{source}: val/images/{name} is missing, see {ANNOTATIONS}")
    words = read_lines(source, files, "words.txt") if "words.txt" in files else []
    by_class = [{c: sorted(split[wnid]) for c, wnid in enumerate(wnids)} for split in (train, test)]
    return RawSet(*by_class, class_names(wnids, words), sorted(pool), files)


def read_lines(source, files, name):
    """The lines of a text file, without space around them. files: {name: path} in `source`."""
    try:
        return [line.strip() for line in files[name].read_text("utf-8").splitlines()]
    except Exception as error:  # a damaged file can raise anything
        reason = first_line(error)
        raise UserError(f"{source}: {name} cannot be read ({reason}); get a new copy") from None


def class_names(wnids, lines):
    """{class id: first word of words.txt}; where two classes share it, their wnids."""
    pairs = (line.partition("\t")[::2] for line in lines)
    words = {wnid: rest.partition(",")[0] for wnid, rest in pairs}
    names = [words.get(wnid, wnid) for wnid in wnids]
    return {c: n if names.count(n) == 1 else wnids[c] for c, n in enumerate(names)}
