"""Tiny-ImageNet, from its archive or the folder that it unpacks to; 64x64 JPEG files."""

from datasets.images import download_file, is_image, list_files
from datasets.spec import RawSet
from runtime.errors import UserError, explain

# The address and MD5 sum are unconfirmed: the download has not been tried yet.
ARCHIVE, MD5 = "tiny-imagenet-200.zip", "90528d7ca1a48142e341f4ef8d21d0de"
URL = f"http://cs231n.stanford.edu/{ARCHIVE}"
ANNOTATIONS = "val/val_annotations.txt"


def read(path, download, with_pool):
    """Names of files; the validation images are the test split, the test images the pool.

    The classes are those of wnids.txt, sorted: 200, but an archive of fewer is read too.
    """
    archive = path / ARCHIVE
    if download and not (path / ARCHIVE.removesuffix(".zip")).is_dir():
        download_file(URL, archive, MD5)
    source = archive if archive.is_file() else path
    files = list_files(source)
    found = [name for name in files if f"/{name}".endswith(f"/{ANNOTATIONS}")]
    if len(found) != 1:
        raise UserError(f"--raw {path}: has neither {ARCHIVE} nor its folder; put one there")
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
    lines = read_lines(source, files, "words.txt") if "words.txt" in files else []
    words = {wnid: rest.partition(",")[0] for wnid, _, rest in (s.partition("\t") for s in lines)}
    names = [words.get(wnid, wnid) for wnid in wnids]  # two classes of one name keep their wnids
    names = {c: n if names.count(n) == 1 else wnids[c] for c, n in enumerate(names)}
    by_class = [{c: sorted(split[wnid]) for c, wnid in enumerate(wnids)} for split in (train, test)]
    return RawSet(*by_class, names, sorted(pool), files)


def read_lines(source, files, name):
    """The lines of a text file, without space around them. files: {name: path} in `source`."""
    with explain(f"{source}: {name}"):
        return [line.strip() for line in files[name].read_text("utf-8").splitlines()]
