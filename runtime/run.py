"""A run's folder: its settings, which of its stages are done, and what came of them.

Every stage of a script (a task trained, a query made, a ticket found) is done once: its result and
the checksums of its files go into run.json. The same command, given again after whatever stopped
it, finds them there and resumes. Within a training stage it resumes at the end of an epoch
(trainer.fit). results.json and log_results.txt are what programs and people read.
"""

import json
import os
import sys
import time
from pathlib import Path
from statistics import mean

from filelock import FileLock, Timeout

from runtime import records
from runtime.checkpoint import describe, load_checkpoint, read_weights, save_checkpoint
from runtime.errors import UserError, first_line
from runtime.files import file_checksum, save_text

# Flags that may differ when a run resumes: they cannot change its result (except for how devices
# round), or what they name is compared by its content.
RESUME_IGNORED = {
    "save_dir", "save_data_path", "overwrite", "print_freq", "device", "gpu", "data", "class_order",
    "weight", "mask", "tensorboard",
}  # fmt: skip
SAVE_SECONDS = 60  # at most so often progress is saved
RECORDS = "metrics.csv", "confusion.csv", "log_results.txt", "results.json", "run.json"
LOG_SECONDS = 30  # without a progress bar, an epoch is printed at most so often


class Run:
    """One run of a script in its folder, which is locked while the process lives.

    Files have names: 'task1_best_model.pt' is in --save_dir, 'data/task1_img.npy' in
    --save_data_path, whose default that is. Every file that is written goes through save(), every
    stage through done() and finish(); a script reads

        if not run.done(stage):
            run.save(name, ...)
            run.finish(stage, name, **result)
        run.load(name), run.result(stage)

    so that it takes the same way whether it starts or resumes.

    script: its name. data: dataset.Data. prefix: goes before the names of its records (main_train
    works in the folder of another run). inputs: {flag: checksum} of what the result depends on
    besides flags and images. Raises UserError if the folder is in use, or another run's.
    """

    def __init__(self, script, args, data, model, prefix="", inputs=None):
        self.args, self.data, self.prefix, self.folder = args, data, prefix, Path(args.save_dir)
        where = os.path.abspath(args.save_data_path)
        # None: the default, which moves with the run
        self.data_folder = None if where == os.path.abspath(self.folder / "data") else where
        self.known = describe(args, data)  # what checkpoints say of the run
        self.results = records.new_results(script, args, data, model)
        self.results["images"] = data.fingerprint()
        self.tensorboard, self.replaying = None, True
        self.checksums = {}  # of files whose stage is not finished
        if args.tensorboard:
            check_tensorboard()
        self.locks = [lock(self.folder, f".{prefix}lock")]
        if not prefix and not args.no_teaching:  # main_train only reads from there
            self.locks.append(lock(Path(args.save_data_path), ".lock"))
        self.journal = self.open_journal(script, inputs or {})
        for name in (*self.journal["wrote"], *(prefix + name for name in RECORDS)):
            for part in self.path(name).parent.glob(f".{self.path(name).name}.*.part"):
                part.unlink()  # a killed process was writing it
        self.epochs = []  # the rows of metrics.csv
        if self.journal["wrote"]:
            self.epochs = records.read_epochs(self.path(f"{prefix}metrics.csv"))
        self.results["states"] = self.journal["rows"]
        self.start = time.monotonic() - self.journal["seconds"]
        self.last_saved = self.last_printed = time.monotonic()
        self.write_journal()  # a folder that cannot be written is reported now, not after a task
        done = [*self.journal["stages"]]
        resumes = f", resumes after {done[-1]}" if done else ""
        summary = records.run_summary(self.results, data, model)
        print(f"{summary}  folder   {self.folder}{resumes}", flush=True)

    # -------------------------------------------------------------------- the folder

    def path(self, name):
        """Where the file of this name is."""
        _, slash, file = name.rpartition("/")
        return Path(self.args.save_data_path if slash else self.folder) / file

    def open_journal(self, script, inputs):
        """What run.json holds, or a new journal. Raises UserError if it is of other settings.

        With --overwrite it removes what a run of this script has written here, and nothing else.
        """
        config = {key: value for key, value in vars(self.args).items() if key not in RESUME_IGNORED}
        config["save_data_path"] = self.data_folder
        inputs = {"--class_order": self.data.order, "--data": self.results["images"]} | inputs
        settings = json.loads(json.dumps({"script": script, "config": config, "inputs": inputs}))
        was, overwrite, wrote = self.read_journal(), self.args.overwrite, []
        if was and was["script"] != script:
            raise UserError(
                f"--save_dir {self.folder}: holds a run of {was['script']}.py; choose "
                f"another folder"
            )
        if was and not overwrite:
            self.check_settings(was, settings)
            was.pop("finished", None)  # until close(), which may find a file damaged
            return was
        if was:
            same = was["config"]["save_data_path"] == self.data_folder
            wrote = [name for name in was["wrote"] if same or "/" not in name]
        found = [] if overwrite else [self.path(f"{self.prefix}results.json")]
        if len(self.locks) > 1 and not (overwrite and self.data_folder is None):
            found += sorted(Path(self.args.save_data_path).glob("task*_img.npy"))
        for path in found:
            if path.exists() and f"data/{path.name}" not in wrote:
                raise UserError(f"{path}: belongs to another run; choose another folder")
        for name in (*wrote, *(self.prefix + name for name in RECORDS)) if overwrite else ():
            self.path(name).unlink(missing_ok=True)  # run.json last, since it lists the files
        return settings | {"stages": {}, "rows": [], "wrote": [], "seconds": 0.0}

    def check_settings(self, was, asked):
        """Raise UserError when the journal is of a run with other settings."""
        differing = []
        for key in sorted({*was["config"], *asked["config"]}):
            old, new = (each["config"].get(key) for each in (was, asked))
            if old != new:
                differing.append(f"--{key} {old} (now {new})")
        for key in sorted({*was["inputs"], *asked["inputs"]}):
            same = was["inputs"].get(key) == asked["inputs"].get(key)
            if not same and not (key == "--data" and differing):  # for the same reason
                differing.append(f"another content of {key}")
        if differing:
            raise UserError(
                f"--save_dir {self.folder}: holds a run with {', '.join(differing)}; resume with "
                f"those, choose another folder, or start over with --overwrite"
            )

    def read_journal(self):
        """What run.json holds, or None where there is none."""
        path = self.path(f"{self.prefix}run.json")
        try:
            journal = json.loads(path.read_text())
            if {*journal} >= {"script", "config", "inputs", "stages", "rows", "wrote", "seconds"}:
                return journal
        except FileNotFoundError:
            return None
        except OSError as error:
            raise UserError(f"{path}: cannot be read ({first_line(error)})") from None
        except (ValueError, TypeError):
            pass
        if self.args.overwrite:  # the files of a damaged one are replaced one by one
            return None
        raise UserError(
            f"{path}: is damaged; choose another folder, or start over with --overwrite"
        )

    def write_journal(self):
        self.journal["seconds"] = time.monotonic() - self.start
        save_text(self.path(f"{self.prefix}run.json"), json.dumps(self.journal, indent=1))

    # -------------------------------------------------------------------- files

    def save(self, name, write, *content):
        """Write a file with write(path, *content), which returns its checksum.

        The name is recorded before, for --overwrite, and the checksum for finish().
        """
        if name not in self.journal["wrote"]:
            self.journal["wrote"].append(name)
            self.write_journal()
        self.checksums[name] = write(self.path(name), *content)

    def save_checkpoint(self, name, content, state):
        """Write a checkpoint, state dict or mask file (a dict) of a model that has learned `state`.

        It also holds `args`, see runtime/checkpoint.py.
        """
        self.save(name, save_checkpoint, content | {"args": self.known | {"state": state}})

    def load(self, name):
        """The checkpoint of this name."""
        return load_checkpoint(self.path(name))

    def load_weights(self, name):
        """The state dict, or the masks, in the file of this name."""
        return read_weights(self.path(name))[1]

    # -------------------------------------------------------------------- stages

    def done(self, stage):
        """Whether a stage is done. Raises UserError if its files are not as it left them."""
        entry = self.journal["stages"].get(stage)
        if entry is None:
            self.replaying, self.epoch_start = False, time.monotonic()
            return False
        for name, checksum in entry["files"].items():
            if file_checksum(self.path(name)) != checksum:
                raise UserError(
                    f"{self.path(name)}: is missing or was changed after {stage} wrote it; put it "
                    f"back, or start over with --overwrite"
                )
        return True

    def finish(self, stage, *names, **result):
        """Record a stage as done, with the names of its files and its plain result."""
        files = {name: self.checksums.pop(name) for name in names}
        self.journal["stages"][stage] = {"result": result, "files": files}
        self.write_journal()
        self.path(f"{stage}_progress.pt").unlink(missing_ok=True)

    def result(self, stage):
        """The result that finish() recorded; None where the stage is not done."""
        return self.journal["stages"].get(stage, {}).get("result")

    def discard(self, prefix):
        """Drop the stages whose names start with `prefix`, and their files: no longer needed."""
        stages = [stage for stage in self.journal["stages"] if stage.startswith(prefix)]
        for stage in stages:
            for name in self.journal["stages"].pop(stage)["files"]:
                self.path(name).unlink(missing_ok=True)
        if stages:
            self.write_journal()

    # -------------------------------------------------------------------- within a stage

    def save_progress(self, stage, content):
        """Save how far a training stage is, to resume from: at most once in SAVE_SECONDS."""
        if time.monotonic() - self.last_saved >= SAVE_SECONDS:
            self.save(f"{stage}_progress.pt", save_checkpoint, content)
            self.write_journal()  # the seconds
            self.last_saved = time.monotonic()

    def progress(self, stage):
        """What save_progress() saved last; None if this run has saved nothing, or it is damaged."""
        name = f"{stage}_progress.pt"
        if name not in self.journal["wrote"] or not self.path(name).exists():
            return None
        try:
            return self.load(name)
        except UserError as error:
            print(f"{error}; {stage} starts over", flush=True)
            return None

    def record_epoch(self, stage, row, images):
        """Add an epoch of a stage to metrics.csv, in place of its rows from that epoch on.

        images: how many it has trained on. The time is that of validation, too.
        """
        now = time.monotonic()
        seconds, self.epoch_start = max(now - self.epoch_start, 1e-9), now
        row = {"stage": stage, **row, "seconds": seconds, "images_per_second": images / seconds}
        kept = (r for r in self.epochs if r["stage"] != stage or r["epoch"] < row["epoch"])
        self.epochs = [*kept, row]
        records.write_epochs(self.path(f"{self.prefix}metrics.csv"), self.epochs)
        if self.args.tensorboard:
            self.write_tensorboard(row)
        if not sys.stderr.isatty() and time.monotonic() - self.last_printed > LOG_SECONDS:
            accuracy = f", accuracy {row['accuracy']:.2f} %" if "accuracy" in row else ""
            speed = f"{row['images_per_second']:.0f} images/s"
            print(f"{stage}: epoch {row['epoch']}, loss {row['loss']:.3f}{accuracy}, {speed}")
            self.last_printed = time.monotonic()

    def write_tensorboard(self, row):
        """Scalars such as loss/task1; at first those of all epochs so far."""
        rows = [row]
        if self.tensorboard is None:
            from torch.utils.tensorboard import SummaryWriter

            folder, rows = self.path(f"{self.prefix}tensorboard"), self.epochs
            for path in folder.glob("events.out.tfevents.*"):
                path.unlink()  # it may hold epochs that come again
            self.tensorboard = SummaryWriter(folder)
        for each in rows:
            for name in each.keys() & {*records.NUMBERS}:
                self.tensorboard.add_scalar(f"{name}/{each['stage']}", each[name], each["epoch"])
        self.tensorboard.flush()

    # -------------------------------------------------------------------- records

    def log(self, text):
        """Print a line, but not again when the run resumes."""
        if not self.replaying:
            print(text, flush=True)

    def add(self, state, evaluated, **more):
        """Add a row to results.json, once for each state.

        evaluated: from trainer.evaluate(), on the test images; more: density (percent) of that
        model, and what else describes it.
        """
        rows = self.results["states"]
        if any(row["state"] == state for row in rows):
            return
        spent = time.monotonic() - self.start - sum(row["seconds"] for row in rows)
        row = {"state": state, "accuracy": evaluated["accuracy"]}
        row |= {"mean": mean(evaluated["accuracy"])}
        row |= {key: evaluated[key] for key in ("task_aware", "recency")} | more
        rows.append(row | {"seconds": spent})
        self.write_journal()
        records.write_results(self.folder, self.prefix, self.results)
        records.print_state(rows[-1])

    def save_confusion(self, confusion):
        """Write confusion.csv, that of the model tested last; see trainer.evaluate()."""
        table = records.confusion_table(confusion, self.results["class_names"])
        save_text(self.path(f"{self.prefix}confusion.csv"), table)

    def close(self, matrix=None):
        """Finish the run. matrix: the accuracies of all states. Returns the results."""
        if matrix:
            records.summarize(self.results, matrix)
        records.write_results(self.folder, self.prefix, self.results)
        self.journal |= {"finished": True, "command": sys.argv[1:]}
        self.write_journal()
        print(f"records: {self.folder}/{self.prefix}results.json", flush=True)
        return self.results


def lock(folder, name):
    """Lock a folder for the life of this process. Raises UserError if another works in it."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        # a singleton: a process may run scripts in one folder, one after the other
        held = FileLock(folder / name, timeout=0, is_singleton=True)
        held.acquire()
    except Timeout:
        raise UserError(
            f"{folder}: another process is working in it; wait for it, or choose another folder"
        ) from None
    except (OSError, NotImplementedError) as error:
        reason = first_line(error)
        raise UserError(f"{folder}: cannot be locked ({reason}); choose another folder") from None
    return held


def check_tensorboard():
    """Raise UserError if TensorBoard is not installed."""
    try:
        import torch.utils.tensorboard  # noqa: F401
    except ImportError:
        raise UserError(
            "--tensorboard: TensorBoard is not installed; pip install tensorboard, or remove "
            "--tensorboard (metrics.csv holds the same)"
        ) from None
