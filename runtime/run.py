"""A run's folder: its settings, which of its steps are done, and what came of them.

Every step of a script (a task trained, a query made, a ticket found) is done once: its result and
the checksums of its files go into run.json. The same command, given again after whatever stopped
it, finds them there and resumes. Within a training step it resumes from the last checkpoint
(trainer.train_task). results.json and log_results.txt are what programs and people read.

Of several ranks (under torchrun), rank 0 alone reads and writes all this; the others get what it
found, so that a step that is done is done for all.
"""

import contextlib
import hashlib
import json
import os
import platform
import re
import sys
import time
from pathlib import Path
from statistics import mean

import numpy as np
import torch

from runtime import locks, ranks
from runtime.checkpoint import load_checkpoint, save_checkpoint
from runtime.epochs import (
    open_tensorboard,
    read_epochs,
    remove_events,
    replace_epochs,
    save_epochs,
    write_tensorboard,
)
from runtime.errors import UserError, first_line
from runtime.files import file_checksum, save_text, temp_path
from runtime.metrics import average_incremental_accuracy, backward_transfer, forgetting
from runtime.ranks import on_rank0

# Flags that may differ when a run resumes: they cannot change its result (except for how devices
# round), or what they name is compared by its content.
RESUME_IGNORED = {
    "save_dir", "save_data_path", "overwrite", "checkpoint_seconds", "print_freq", "device", "gpu",
    "data", "raw", "source", "image_size", "unlabeled", "class_order", "weight", "mask",
    "tensorboard",
}  # fmt: skip
BOUNDS = "joint", "finetune"  # switches of main_CIL, whose runs bound the others

# ------------------------------------------------------------------------------ records


def device_name(device):
    """The name of the device, for the records."""
    if device.type == "cuda":
        return f"{device} ({torch.cuda.get_device_name(device)})"
    return f"{device} ({platform.processor() or platform.machine()})"


def header(script, args, data, model):
    """The header of a run: device, data, network, schedule, as lines of text."""
    parameters = list(model.parameters())
    threads = f", {torch.get_num_threads()} threads" if parameters[0].device.type == "cpu" else ""
    threads += f" x {ranks.world()} processes" if ranks.world() > 1 else ""
    counts = ", ".join(f"{count:,} {part}" for part, count in data.counts().items() if count)
    lines = {
        "device": f"{device_name(parameters[0].device)}{threads}, PyTorch {torch.__version__}",
        "data": f"{args.dataset}, {data.classifiers} x {data.classes_per_classifier} classes; "
        f"images: {counts} ({data.source})",
        "network": f"{args.arch}, width {args.width}, {args.precision}: "
        f"{sum(p.numel() for p in parameters):,} parameters",
    }
    if "epochs" in args:
        milestones = ", ".join(map(str, args.decreasing_lr))
        rate = f"lr {args.lr:g}" + f", divided by 10 after epochs {milestones}" * bool(milestones)
        batches = f"batch size {args.batch_size}, {rate}, seed {args.seed}"
        lines["schedule"] = f"epochs per task {args.epochs}, {batches}"
    if "iter_epochs" in args:
        schedule = ",".join(map(str, getattr(args, "prune_scheduler", ())))
        lines["pruning"] = (
            f"{100 * args.percent:g} %{f' x {schedule}' * bool(schedule)} by {args.criterion}; "
            f"retraining: epochs {args.iter_epochs}, lr {args.lr / 100:g}"
        )
    return f"{script}.py\n" + "".join(f"  {name:<9}{text}\n" for name, text in lines.items())


class Record:
    """What a run reports: results.json for programs, log_results.txt (tab-separated) for people.

    Both are written after every state. prefix: goes before both names (main_train and test may
    work in the folder of another run). Without a --save_dir, which test.py need not have, nothing
    is written.
    """

    def __init__(self, script, args, data, model, prefix=""):
        compare_ranks(args, data, model)
        self.folder, self.prefix = args.save_dir, prefix
        self.header = header(script, args, data, model)
        self.results = {
            "script": script,
            "config": vars(args) | {"data": str(data.source)},
            "class_order": data.order,
            "class_names": [str(data.names.get(c, c)) for c in data.order],
            "image_size": data.image_size,
            "device": device_name(next(model.parameters()).device),
            "processes": ranks.world(),
            "versions": {
                "python": platform.python_version(),
                "torch": torch.__version__,
                "numpy": np.__version__,
            },
            "states": [],
        }

    def add(self, state, accuracy, density, **more):
        """Add a row: accuracy is a list (percent, tasks 1..), density that of the tested model.

        more: task_aware and confusion, from trainer.evaluate(), and what the script records.
        """
        row = {"state": state, "accuracy": accuracy, "mean": mean(accuracy)}
        row |= {"density": density} | more
        self.results["states"].append(row)
        self.write()
        listed = " ".join(f"{a:.2f}" for a in accuracy)
        print(
            f"state {state}: test accuracy {listed}, mean {row['mean']:.2f} % "
            f"(task-aware {mean(more['task_aware']):.2f} %) at {density:.2f} % of the weights"
            + (f"; next ticket {more['ticket_density']:.2f} %" if "ticket_density" in more else ""),
            flush=True,
        )

    def close(self, matrix=None):
        """Write the last time; with the accuracy matrix of all states, its summaries too."""
        if matrix:
            average, lost = average_incremental_accuracy(matrix), forgetting(matrix)
            transfer = backward_transfer(matrix)
            self.results |= {"average_incremental_accuracy": average, "forgetting": lost}
            self.results["backward_transfer"] = transfer
            summary = f"average incremental accuracy {average:.2f} %"
            if lost is not None:
                summary += f", forgetting {lost:.2f}, backward transfer {transfer:.2f} points"
            print(summary)
        self.write()
        if self.folder:
            print(f"records: {self.folder}/{self.prefix}results.json", flush=True)
        return self.results

    @on_rank0
    def write(self):
        if self.folder:
            folder, prefix = Path(self.folder), self.prefix
            text = json.dumps(self.results, indent=1) + "\n"
            save_text(folder / f"{prefix}results.json", text)
            save_text(folder / f"{prefix}log_results.txt", log_table(self.results["states"]))


def record_paths(checkpoint):
    """Where the results.json of the run may be that wrote a checkpoint, the likeliest first.

    main_train.py, which works in the folder of another run, has its own.
    """
    path = Path(checkpoint)
    retrained = re.match(r"(retrain_task\d+_(?:\w+_)??)(best_model|checkpoint)\.", path.name)
    prefixes = [retrained[1], ""] if retrained else [""]
    return [path.with_name(f"{prefix}results.json") for prefix in prefixes]


def compare_ranks(args, data, model):
    """Raise UserError if another rank has other flags, images or weights to start from."""
    if ranks.world() > 1:
        flags = {f"--{key}": x for key, x in vars(args).items() if key not in RESUME_IGNORED}
        weights = hashlib.sha256()
        for value in model.state_dict().values():
            weights.update(value.cpu().contiguous().numpy())
        content = {"--data": data.fingerprint(), "the weights": weights.hexdigest()}
        ranks.compare(flags | content)


def log_table(rows):
    """The states as tab-separated lines under a line of names."""
    tasks = max((len(row["accuracy"]) for row in rows), default=0)
    columns = {"mean": ".2f", "density": ".2f", "ticket_density": ".2f", "seconds": ".0f"}
    names = ["state", *(f"task{t + 1}" for t in range(tasks))]
    lines = [[*names, "mean", "density_tested", "density_ticket", "seconds"]]
    for row in rows:
        cells = [f"{a:.2f}" for a in row["accuracy"]]
        cells += [""] * (tasks - len(cells))
        cells += [f"{row[name]:{form}}" if name in row else "" for name, form in columns.items()]
        lines.append([str(row["state"]), *cells])
    return "".join("\t".join(line) + "\n" for line in lines)


# ------------------------------------------------------------------------------ runs


class Run(Record):
    """A Record that remembers the run's steps. Raises UserError if the folder is another run's.

    inputs: {flag: checksum} of what the result depends on besides flags and images. prefix: goes
    before the names of its records, as in Record.

    Files have names: 'task1_best_model.pt' is in --save_dir, 'data/task1_img.npy' in
    --save_data_path, whose default that is.
    """

    def __init__(self, script, args, data, model, prefix="", inputs=None):
        super().__init__(script, args, data, model, prefix)
        self.args, self.data, self.folder = args, data, Path(args.save_dir)
        self.start, self.replaying = time.monotonic(), True
        self.checksums, self.redone, self.journal = {}, set(), {}
        self.results["states"] = self.open(self.settings_of(data, inputs or {}))

    @on_rank0
    def open(self, settings):
        """Claim the folder and read its journal, or begin one. Returns the states recorded."""
        args = self.args
        self.claim_folders()
        if args.overwrite:
            self.remove_all()
        self.checksum = json_checksum(settings)
        self.journal = self.read_journal()
        if self.journal:
            self.check_settings(settings)
            self.journal.pop("finished", None)  # until close(), which may find a file damaged
            self.start -= self.journal["seconds"]
            self.epochs = read_epochs(self.path(f"{self.prefix}metrics.csv"))
        else:
            self.epochs = []
            self.journal = settings | {"steps": {}, "rows": [], "wrote": [], "seconds": 0.0}
        self.check_soft_labels(self.journal)
        self.results["states"] = self.journal["rows"]
        self.tensorboard = None
        if args.tensorboard:
            self.journal["tensorboard"] = True
            self.tensorboard = open_tensorboard(self.tensorboard_folder(), self.epochs)
        done = [*self.journal["steps"]]
        if not done:
            self.write()  # a folder that cannot be written is reported now, not after a task
        resumes = f", resumes after {done[-1]}" if done else ""
        print(f"{self.header}  folder   {self.folder}{resumes}", flush=True)
        return self.journal["rows"]

    def settings_of(self, data, inputs):
        """What a run must share with the journal to resume it, as JSON holds it."""
        args, script = self.args, self.results["script"]
        ignored = RESUME_IGNORED | ({"unlabel_num"} if args.no_teaching else set())
        config = {key: value for key, value in vars(args).items() if key not in ignored}
        self.results["images"] = data.fingerprint()
        # the order comes before the images, whose checksum depends on it
        inputs = {"--class_order": data.order, "--data": self.results["images"]} | inputs
        return json.loads(json.dumps({"script": script, "config": config, "inputs": inputs}))

    # -------------------------------------------------------------------- the folder

    def path(self, name):
        """Where the file of this name is."""
        folder, slash, file = name.rpartition("/")
        return Path(self.args.save_data_path if slash else self.folder) / file

    def journal_path(self):
        return self.path(f"{self.prefix}run.json")

    def tensorboard_folder(self):
        return self.path(f"{self.prefix}tensorboard")

    def data_folder(self):
        """--save_data_path relative to --save_dir, which may move with it."""
        return os.path.relpath(self.args.save_data_path, self.folder)

    def claim_folders(self):
        """Lock the run's folders. Raises UserError if another run is in them, or left records."""
        results = self.path(f"{self.prefix}results.json")
        journal = self.journal_path()
        if results.exists() and not journal.exists() and not self.args.overwrite:
            raise UserError(
                f"--save_dir {self.folder}: holds {results.name}, but no {journal.name} to resume "
                f"from; name another folder, or give --overwrite"
            )
        self.locks = {"save_dir": locks.lock_folder(self.folder, "save_dir", self.prefix)}
        # main_train, the script with a prefix, only reads from --save_data_path
        if not self.prefix and not self.args.no_teaching:
            folder = Path(self.args.save_data_path)
            self.locks["save_data_path"] = locks.lock_folder(folder, "save_data_path")

    def check_soft_labels(self, journal):
        """Raise UserError if teaching would replace another run's soft labels.

        A run that starts over replaces those in its own folder, even if its journal is damaged.
        """
        own = self.data_folder() == "data"
        if "save_data_path" not in self.locks or (own and self.args.overwrite):
            return
        advice = "give --overwrite" if own else "remove them"
        for t in range(1, self.args.classifiers):
            step, name = f"task{t}_teaching", f"data/task{t}_img.npy"
            if self.path(name).exists() and not self.has_written(journal, step, name):
                raise UserError(
                    f"--save_data_path {self.args.save_data_path}: holds {self.path(name).name}, "
                    f"soft labels that are not of this run; name another folder, or {advice}"
                )

    def has_written(self, journal, step, name):
        """Whether a step of the journal's run has written this file; the folders may have moved."""
        if journal.get("data_folder") == self.data_folder():
            return name in journal["wrote"]
        entry = journal.get("steps", {}).get(step)
        return bool(entry) and entry["files"].get(name) == file_checksum(self.path(name))

    def check_locks(self):
        """Raise UserError if another process has taken the folders. Called before each write."""
        for flag, path in self.locks.items():
            locks.check(path, flag)

    def read_journal(self):
        """What run.json holds, or None where there is none."""
        path = self.journal_path()
        try:
            content = json.loads(path.read_text())
            checksum = content.pop("checksum")
        except FileNotFoundError:
            return None
        except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError):
            content, checksum = None, ""
        if checksum != json_checksum(content):
            raise UserError(
                f"{path}: is damaged, so that the run cannot resume; "
                f"name another --save_dir, or start over with --overwrite"
            )
        return content

    def check_settings(self, asked):
        """Raise UserError when the journal is of a run with other settings."""
        was = self.journal
        self.check_script(was)
        skip = set()
        if asked["config"]["no_teaching"] or was["config"]["no_teaching"]:
            skip.add("unlabel_num")  # nothing is queried
        for kind, key in (
            ("inputs", "--class_order"),
            ("config", "classifiers"),
            ("config", "no_teaching"),
        ):
            if was[kind].get(key) != asked[kind][key]:
                skip.add("--data")  # its images differ for that reason alone
        if any(was["config"].get(key, False) != asked["config"].get(key, False) for key in BOUNDS):
            skip.add("no_teaching")  # which they imply
        differing = []
        for kind, form in (("config", "--{} {} (now {})"), ("inputs", "{} of content {} (now {})")):
            for key in {**was[kind], **asked[kind]}:
                old, new = was[kind].get(key), asked[kind].get(key)
                if old is None and isinstance(new, bool):
                    old = False  # a switch that came after the run
                if old != new and key not in skip:
                    differing.append(form.format(key, as_typed(old), as_typed(new)))
        if differing:
            raise UserError(
                f"--save_dir {self.folder}: holds a run with {', '.join(differing)}; resume with "
                f"those, name another folder, or start over with --overwrite"
            )

    def check_script(self, journal):
        if journal["script"] != self.results["script"]:
            raise UserError(
                f"--save_dir {self.folder}: holds a run of {journal['script']}.py; "
                f"name another folder"
            )

    def remove_all(self):
        """Remove what a run of this script has written here, and nothing else."""
        journal = {"script": self.results["script"], "wrote": []}
        with contextlib.suppress(UserError):  # a damaged one: its files are replaced one by one
            journal = self.read_journal() or journal
        self.check_script(journal)
        self.check_soft_labels(journal)
        same = journal.get("data_folder") == self.data_folder()
        for name in journal["wrote"]:
            if same or "/" not in name:  # another --save_data_path holds files of others
                self.remove(name)
        if journal.get("tensorboard"):
            remove_events(self.tensorboard_folder())
        for name in ("metrics.csv", "log_results.txt", "results.json"):
            self.remove(self.prefix + name)
        self.remove(f"{self.prefix}run.json")  # the last, since it lists the files

    @on_rank0
    def remove(self, name):
        """Remove a file of the run, and what a killed writer left of it."""
        path = self.path(name)
        for file in (path, temp_path(path)):
            try:
                file.unlink()
            except (FileNotFoundError, NotADirectoryError):
                pass
            except OSError as error:
                reason = first_line(error)
                raise UserError(
                    f"{file}: cannot be removed ({reason}); remove it yourself"
                ) from None

    # -------------------------------------------------------------------- files

    @on_rank0
    def save(self, name, write, content):
        """Write a file with write(path, content), which returns its checksum.

        The name is recorded before, for remove_all(), and the checksum for finish().
        """
        self.check_locks()
        if name not in self.journal["wrote"]:
            self.journal["wrote"].append(name)
            self.write_journal()
        self.checksums[name] = write(self.path(name), content)

    @on_rank0
    def load(self, name):
        """The checkpoint of this name."""
        return load_checkpoint(self.path(name))

    # -------------------------------------------------------------------- steps

    @on_rank0
    def done(self, step):
        """Whether a step is done and its files are as it left them; if not, it is to be done."""
        entry = self.journal["steps"].get(step)
        for name, checksum in entry["files"].items() if entry else ():
            path = self.path(name)
            found = file_checksum(path)
            if found != checksum:
                problem = "is damaged" if found else "is missing"
                print(f"{path}: {problem}, so {step} is done again", flush=True)
                self.redone.add(step)
                self.write_journal()  # the run is not finished any more
                entry = None
                break
        if entry is None:
            self.replaying = False
            return False
        self.remove(f"{step}_progress.pt")  # if it was stopped right after it had finished
        return True

    @on_rank0
    def finish(self, step, *names, **result):
        """Record a step as done, with the names of its files and its plain result.

        Raises UserError if it was done again with another outcome, and others depend on it.
        """
        files = {name: self.checksums[name] for name in names}
        steps = self.journal["steps"]
        if step in self.redone and step != [*steps][-1] and files != steps[step]["files"]:
            raise UserError(
                f"--save_dir {self.folder}: {step}, done again, has another outcome (another "
                f"machine, device or number of threads?), and later steps depend on it; "
                f"put its files back, or start over with --overwrite"
            )
        steps[step] = {"result": result, "files": files}
        self.write_journal()
        self.remove(f"{step}_progress.pt")

    @on_rank0
    def result(self, step):
        """The result that finish() recorded; None where the step is not done."""
        return self.journal["steps"].get(step, {}).get("result")

    def cached(self, step, function, *arguments):
        """function(*arguments), a plain value, computed once in the life of the run."""
        if not self.done(step):
            self.finish(step, value=function(*arguments))
        return self.result(step)["value"]

    @on_rank0
    def discard_steps(self, prefix):
        """Drop the steps whose names start with `prefix`, and their files: no longer needed."""
        steps = [step for step in self.journal["steps"] if step.startswith(prefix)]
        for step in steps:
            for name in self.journal["steps"].pop(step)["files"]:
                self.remove(name)
        if steps:
            self.write_journal()

    def log(self, text):
        """Print a line, but not again when the run resumes."""
        if not self.replaying:
            print(text, flush=True)

    # -------------------------------------------------------------------- within a step

    @on_rank0
    def save_progress(self, step, content):
        """Save how far a step is, to resume from."""
        content = content | {"settings": self.checksum}
        self.save(f"{step}_progress.pt", save_checkpoint, content)
        self.write_journal()  # the seconds

    @on_rank0
    def progress(self, step, keys):
        """What save_progress() saved last, a dict of these keys; None if nothing, or damaged."""
        path = self.path(f"{step}_progress.pt")
        if not path.exists():
            return None
        try:
            content = load_checkpoint(path)
            if content.pop("settings", None) != self.checksum or content.keys() != keys:
                raise UserError(f"{path}: is of another run or version")
        except UserError as error:
            print(f"{error}; {step} starts over", flush=True)
            return None
        return content

    # -------------------------------------------------------------------- records

    @on_rank0
    def record_epoch(self, step, row):
        """Add an epoch of a step to metrics.csv, in place of its rows from that epoch on."""
        self.check_locks()
        row = {"step": step} | row
        rows = replace_epochs(self.epochs, row)
        repeated, self.epochs = len(rows) <= len(self.epochs), rows
        save_epochs(self.path(f"{self.prefix}metrics.csv"), rows)
        if self.tensorboard and repeated:
            self.tensorboard.close()
            self.tensorboard = open_tensorboard(self.tensorboard_folder(), rows)
        elif self.tensorboard:
            write_tensorboard(self.tensorboard, [row])

    def add(self, state, accuracy, density, **more):
        """Record.add, once for each state; the seconds spent in it are filled in."""
        rows = self.results["states"]
        if all(row["state"] != state for row in rows):
            spent = time.monotonic() - self.start - sum(row["seconds"] for row in rows)
            super().add(state, accuracy, density, **more, seconds=spent)

    def close(self, matrix=None):
        self.journal |= {"finished": True, "command": sys.argv[1:]}
        return super().close(matrix)

    @on_rank0
    def write(self):
        self.write_journal()
        super().write()

    def write_journal(self):
        self.check_locks()
        self.journal["seconds"] = time.monotonic() - self.start
        self.journal["data_folder"] = self.data_folder()
        journal = self.journal | {"checksum": json_checksum(self.journal)}
        save_text(self.journal_path(), json.dumps(journal, indent=1))


def as_typed(value):
    """A setting as it is typed after its flag."""
    return ",".join(map(str, value)) if isinstance(value, list) else str(value)


def json_checksum(content):
    """SHA-256 of what JSON can hold, whatever the order of its keys."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
