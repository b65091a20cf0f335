"""The epochs of a run: metrics.csv, a row for each epoch of each training, and TensorBoard's files.

metrics.csv is what counts. It is written as a whole, atomically, after each epoch, so that a killed
run loses at most the epoch it is in. A resumed run may repeat epochs; they replace those rows.
"""

import csv
import io
import math

from runtime.errors import UserError, first_line
from runtime.files import save_text

PARTS = "random", "new", "old", "distillation", "distillation_main"  # of the loss, not weighted
NUMBERS = "lr", "loss", *PARTS, "accuracy", "seconds", "images_per_second"
COLUMNS = {"step": str, "epoch": int} | dict.fromkeys(NUMBERS, float)


def epochs_path(results):
    """The metrics.csv that belongs to a results.json (a Path), whatever prefix they have."""
    return results.with_name(results.name.replace("results.json", "metrics.csv"))


def read_epochs(path):
    """The rows of a metrics.csv, dicts without the empty cells; [] if there is none.

    Raises UserError if the file is damaged.
    """
    try:
        with open(path, newline="") as file:
            reader = csv.DictReader(file, strict=True)
            rows = [parse_row(line) for line in reader]
        if (reader.fieldnames or []) != [*COLUMNS]:
            raise ValueError
        return rows
    except FileNotFoundError:
        return []
    except (OSError, ValueError, LookupError, TypeError, OverflowError, csv.Error):
        raise UserError(
            f"{path}: is damaged; remove it (the curves so far are lost, nothing else) or put an "
            f"intact copy back"
        ) from None


def parse_row(line):
    """A row from the texts of a line."""
    if [*line] != [*COLUMNS] or None in line.values():  # too many cells, or too few
        raise ValueError
    row = {name: COLUMNS[name](text) for name, text in line.items() if text}
    numbers = [value for name, value in row.items() if name != "step"]
    if "step" not in row or row["epoch"] < 1 or not all(map(math.isfinite, numbers)):
        raise ValueError
    return row


def save_epochs(path, rows):
    """Write rows as metrics.csv."""
    file = io.StringIO()
    writer = csv.DictWriter(file, COLUMNS, restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    save_text(path, file.getvalue())


def replace_epochs(rows, row):
    """rows with `row` in place of those of the same step from its epoch on, or at the end."""
    same = [i for i, other in enumerate(rows) if other["step"] == row["step"]]
    earlier = [i for i in same if rows[i]["epoch"] < row["epoch"]]
    place = earlier[-1] + 1 if earlier else same[0] if same else len(rows)
    return [*rows[:place], row, *(r for r in rows[place:] if r["step"] != row["step"])]


# ------------------------------------------------------------------------------ TensorBoard


def remove_events(folder):
    """Remove TensorBoard's files from a folder, and the folder if it is then empty."""
    for path in folder.glob("events.out.tfevents.*"):
        path.unlink()
    if folder.is_dir() and not any(folder.iterdir()):
        folder.rmdir()


def open_tensorboard(folder, rows):
    """A SummaryWriter in `folder`, in place of what was there; it holds these rows at first.

    Raises UserError if TensorBoard is missing, or the folder cannot be written.
    """
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise UserError(
            "--tensorboard: TensorBoard is not installed; pip install tensorboard, or leave the "
            "flag out (metrics.csv holds the same)"
        ) from None
    try:
        remove_events(folder)
        writer = SummaryWriter(folder)
    except OSError as error:
        raise UserError(
            f"--tensorboard: {folder} cannot be written ({first_line(error)}); name another folder"
        ) from None
    write_tensorboard(writer, rows)
    return writer


def write_tensorboard(writer, rows):
    """Scalars such as loss/task1, at the rows' epochs."""
    for row in rows:
        for name in row.keys() & {*NUMBERS}:
            writer.add_scalar(f"{name}/{row['step']}", row[name], row["epoch"])
    writer.flush()
