"""A dataset as a table and as a picture."""

from PIL import Image, ImageDraw

from datasets.spec import SPLITS
from runtime.errors import one_line


def table(data):
    """The classes in task order with the counts of each split, as lines of text."""
    names = {k: one_line(data.names.get(k, "")) for k in data.order}
    width = max(12, *map(len, names.values()))
    row = f"{{:>4}}  {{:>5}}  {{:<{width}}}  {{:>6}}  {{:>6}}  {{:>6}}  {{:>9}}".format
    lines = [row("task", "class", "name", *SPLITS)]
    for i, k in enumerate(data.order):
        counts = [len(getattr(data, split)[k]) for split in SPLITS]
        lines.append(row(i // data.classes_per_classifier + 1, k, names[k], *counts))
    *totals, pool = data.counts().values()
    lines.append(row("", "", "all", *totals))
    height, width = data.image_size
    return "\n".join([*lines, f"pool: {pool} unlabeled images; all {height}x{width}"])


def draw(data):
    """A Pillow image: a row for each task, some training images of each of its classes."""
    c = data.classes_per_classifier
    columns = max(2, 16 // c)
    height, width = (max(1, 64 // side) * side for side in data.image_size)
    margin, gap, label = 70, 12, 16
    size = (margin + c * (columns * width + gap), data.classifiers * (height + label + 4) + 4)
    picture = Image.new("RGB", size, "white")
    pen = ImageDraw.Draw(picture)
    for i, k in enumerate(data.order):
        task, column = divmod(i, c)
        x, y = margin + column * (columns * width + gap), task * (height + label + 4) + 4
        pen.text((x, y), f"{k} {one_line(data.names.get(k, ''))}", fill="black")
        if not column:
            pen.text((8, y + label + height // 2 - 6), f"task {task + 1}", fill="black")
        for j, image in enumerate(data.train[k][:columns].cpu().numpy()):
            tile = Image.fromarray(image).resize((width, height), Image.Resampling.NEAREST)
            picture.paste(tile, (x + j * width, y + label))
    return picture
