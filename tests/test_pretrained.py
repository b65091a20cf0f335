"""The files in pretrained/: their checksums, and what they make of 40 real images.

    python tests/test_pretrained.py --data data/cifar10

prints the rows of the tables in pretrained/README.md, as test.py measures them.
"""

import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))  # as a program, which pytest does otherwise

import test as test_script  # noqa: E402
from runtime import packed  # noqa: E402
from runtime.files import file_checksum  # noqa: E402
from tools.classify import probabilities  # noqa: E402
from tools.pack import main as run_pack  # noqa: E402
from tools.pack import read_network  # noqa: E402

FOLDER = ROOT / "pretrained"
FILES = sorted(FOLDER.glob("*.npz"))
# | `file.npz` | density | bytes | right of the 40 | sha256 |
ROW = r"\| `(\w+\.npz)` \| ([\d.]+) % \| ([\d,]+) \| (\d+) of (\d+) \| `(\w{64})` \|"
ROWS = {row[0]: row[1:] for row in re.findall(ROW, (FOLDER / "README.md").read_text())}


def few_images():
    """The first four CIFAR-10 test images of each class: uint8 [10,4,32,32,3]."""
    strip = np.asarray(Image.open(FOLDER / "cifar10_test.png"))
    return strip.reshape(10, 32, 4, 32, 3).transpose(0, 2, 1, 3, 4)


def right(header, model):
    """How many of the images of the classes learned so far it gets right, and of how many."""
    classes = header["class_order"][: header["state"] * header["classes_per_classifier"]]
    images = np.concatenate(few_images()[classes])
    labels = torch.arange(len(classes)).repeat_interleave(4)
    found = probabilities(model, images, header, header["state"]).argmax(1)
    return int((found == labels).sum()), len(labels)


def test_the_table_lists_the_files():
    assert {path.name for path in FILES} == ROWS.keys()
    assert sum(path.stat().st_size for path in FILES) <= 5e6


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_file_is_the_one_in_the_table_and_works(path, tmp_path):
    density, size, correct, count, checksum = ROWS[path.name]
    assert checksum == file_checksum(path) and int(size.replace(",", "")) == path.stat().st_size
    header, model = read_network(path)
    assert not [key for key in header if header[key] is None] and header["dataset"] == "cifar10"
    assert density == f"{header['density']:.2f}"
    found, of = right(header, model)
    # another processor may round another way where two classes are as likely
    assert of == int(count) and abs(found - int(correct)) <= 1
    unpacked, again = str(tmp_path / "a.pt"), str(tmp_path / "a.npz")
    run_pack([str(path), "--unpack", "--out", unpacked])
    run_pack([unpacked, "--out", again])
    (header, state), (new_header, new_state) = packed.read(path), packed.read(again)
    # not the bytes of the file, which another zlib compresses otherwise
    assert header == new_header and state.keys() == new_state.keys()
    assert all(torch.equal(state[key], new_state[key]) for key in state)


def print_rows(flags):
    """flags: of test.py, such as --data."""
    accuracies = []
    for path in FILES:
        header, model = read_network(path)
        correct, count = right(header, model)
        print(
            f"| `{path.name}` | {header['density']:.2f} % | {path.stat().st_size:,} | "
            f"{correct} of {count} | `{file_checksum(path)}` |"
        )
        call = ["--pretrained", str(path), *["--pruned"] * (header["kind"] == "ticket"), *flags]
        states = range(1, header["state"] + 1)
        tested = [test_script.main([*call, "--state", str(t)])["states"][0] for t in states]
        means = [f"{each['mean']:.2f}" for each in tested]
        accuracies.append(f"| `{path.name}` | {' | '.join(means)} |")
    print("\n".join(accuracies))
    fields = ("state", "accuracy", "class_order", "class_names", "command", "sha256")
    for path in FILES:
        header = read_network(path)[0]
        print(path.name, *(f"{key}: {header[key]}" for key in fields), sep="\n  ")


if __name__ == "__main__":
    print_rows(sys.argv[1:])
