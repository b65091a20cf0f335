"""A run's folder: what it was asked for, which of its steps are done, what came of them.

Every step of a script (a task trained, a query made, a ticket found) is done once: its result and
the checksums of its files go into run.json, and the same command, given again after whatever
stopped it, finds them there and goes on. Within a step of training the last checkpoint is taken
up (trainer.fit). results.json and log_results.txt are what people and programs read of it.
"""

import contextlib
import hashlib
import json
import os
import time
from pathlib import Path

import dataset
import utils
from utils import Refusal

try:
    import fcntl
except ImportError:  # not on Windows, where two processes on one folder are not noticed
    fcntl = None

# Flags that may differ when a run goes on: they cannot change its result (but for how devices
# round), or what they name is compared by its content.
FREE = {
    "save_dir", "save_data_path", "overwrite", "checkpoint_seconds", "print_freq", "device", "gpu",
    "data", "raw", "source", "image_size", "unlabeled", "class_order", "weight", "mask",
}  # fmt: skip
LOCKS = {}  # lock files that this process holds open


class Run(utils.Record):
    """A Record that remembers the run's steps. Raises Refusal if the folder is another run's.

    inputs: {flag: checksum} of what the result hangs on besides flags and images. prefix: goes
    before the names of its records, as in Record.

    Files have names: 'task1_best_model.pt' lies in --save_dir, 'data/task1_img.npy' in
    --save_data_path, whose default that is.
    """

    def __init__(self, script, args, data, device, prefix="", inputs=None):
        super().__init__(script, args, data, device, prefix)
        self.args, self.folder = args, Path(args.save_dir)
        self.began, self.replaying, self.sums, self.again = time.monotonic(), True, {}, set()
        free = FREE | ({"unlabel_num"} if args.no_teaching else set())
        config = {key: value for key, value in vars(args).items() if key not in free}
        order = {"--class_order": data.order}  # before the images, whose checksum hangs on it
        self.results["images"] = dataset.fingerprint(data)
        inputs = order | {"--data": self.results["images"]} | (inputs or {})
        asked = json.loads(json.dumps({"script": script, "config": config, "inputs": inputs}))
        journal, results = (self.path(prefix + name) for name in ("run.json", "results.json"))
        if results.exists() and not journal.exists() and not args.overwrite:
            raise Refusal(
                f"--save_dir {self.folder}: holds {results.name}, but no {journal.name} to go on "
                f"with; name another folder, or give --overwrite"
            )
        self.lock(self.folder, "save_dir", prefix)
        if not (prefix or args.no_teaching):  # main_train, which has one, only reads there
            self.lock(Path(args.save_data_path), "save_data_path")
        if args.overwrite:
            self.remove_all(script)
        self.settings = checksum_of(asked)
        self.journal = self.read_journal()
        if self.journal:
            self.refuse_others(asked)
            self.began -= self.journal["seconds"]
            if steps := [*self.journal["steps"]]:
                print(f"{self.folder}: goes on after {steps[-1]}", flush=True)
        else:
            self.journal = asked | {"steps": {}, "rows": [], "wrote": [], "seconds": 0.0}
            self.write()  # a folder that cannot be written is told now, not after the first task
        self.results["states"] = self.journal["rows"]

    # -------------------------------------------------------------------- the folder

    def path(self, name):
        """Where the file of this name lies."""
        folder, slash, file = name.rpartition("/")
        return Path(self.args.save_data_path if slash else self.folder) / file

    def data_folder(self):
        """Where --save_data_path lies, seen from --save_dir, which may move with it."""
        return os.path.relpath(self.args.save_data_path, self.folder)

    def lock(self, folder, flag, prefix=""):
        """Refuse a folder in which another process is at work. A killed one holds no lock."""
        path = folder / f".{prefix}lock"
        with contextlib.suppress(KeyError):  # of an earlier run in this process
            LOCKS.pop(str(path)).close()
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            file = open(path, "a+")  # noqa: SIM115  (it is held as long as the process lives)
        except OSError as error:
            words = f"cannot be written ({utils.first_line(error)}); name another folder"
            raise Refusal(f"--{flag} {folder}: {words}") from None
        try:
            if fcntl:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            raise Refusal(
                f"--{flag} {folder}: process {file.read().strip()} is at work in it; "
                f"wait for it, or name another folder"
            ) from None
        except OSError:
            pass  # a file system without locks
        LOCKS[str(path)] = file
        with contextlib.suppress(OSError):  # on a full disk it stays without a name
            file.truncate(0)
            file.write(str(os.getpid()))
            file.flush()

    def read_journal(self):
        """What run.json holds, or None where there is none."""
        path = self.path(self.prefix + "run.json")
        try:
            content = json.loads(path.read_text())
            checksum = content.pop("checksum")
        except FileNotFoundError:
            return None
        except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError):
            content, checksum = None, ""
        if checksum != checksum_of(content):
            raise Refusal(
                f"{path}: is damaged, so that the run cannot go on; "
                f"name another --save_dir, or begin anew with --overwrite"
            )
        return content

    def refuse_others(self, asked):
        """Refuse to go on with other settings than the run has."""
        was = self.journal
        self.refuse_other_script(was, asked["script"])
        if "control" in asked["config"]:
            was["config"].setdefault("control", "none")  # a ticket of before the flag
        differing, skip = [], set()
        if asked["config"]["no_teaching"] or was["config"].get("no_teaching"):
            skip.add("unlabel_num")  # nothing is queried
        for kind, key in (
            ("inputs", "--class_order"),
            ("config", "classifiers"),
            ("config", "no_teaching"),
        ):
            if was[kind].get(key) != asked[kind][key]:
                skip.add("--data")  # its images are others for that alone
        for kind, words in (
            ("config", "--{} {} (now {})"),
            ("inputs", "{} of content {} (now {})"),
        ):
            for key in {**was[kind], **asked[kind]}:
                old, new = was[kind].get(key), asked[kind].get(key)
                if old != new and key not in skip:
                    old, new = (
                        ",".join(map(str, each)) if isinstance(each, list) else str(each)
                        for each in (old, new)
                    )
                    differing.append(words.format(key, old, new))
        if differing:
            raise Refusal(
                f"--save_dir {self.folder}: holds a run with {', '.join(differing)}; go on with "
                f"those, name another folder, or begin anew with --overwrite"
            )

    def refuse_other_script(self, journal, script):
        if journal["script"] != script:
            words = f"holds a run of {journal['script']}.py; name another folder"
            raise Refusal(f"--save_dir {self.folder}: {words}")

    def remove_all(self, script):
        """Remove what a run of this script has written here, and nothing else."""
        journal = {"script": script, "wrote": []}
        with contextlib.suppress(Refusal):  # a damaged one: its files are replaced one by one
            journal = self.read_journal() or journal
        self.refuse_other_script(journal, script)
        same = journal.get("data_folder") == self.data_folder()
        for name in journal["wrote"]:
            if same or "/" not in name:  # in another --save_data_path lie others' files
                self.remove(name)
        for name in ("log_results.txt", "results.json", "run.json"):  # the last tells of the files
            self.remove(self.prefix + name)

    def remove(self, name):
        """Remove a file of the run, and what a killed writer left of it."""
        path = self.path(name)
        for file in (path, utils.beside(path)):
            try:
                file.unlink()
            except (FileNotFoundError, NotADirectoryError):
                pass
            except OSError as error:
                words = f"cannot be removed ({utils.first_line(error)}); remove it yourself"
                raise Refusal(f"{file}: {words}") from None

    # -------------------------------------------------------------------- files

    def keep(self, name, save, content):
        """Write a file with save(path, content), wholly or not at all.

        save: utils.save, utils.save_array or another that returns the checksum. The name is noted
        beforehand, the checksum for finish().
        """
        if name not in self.journal["wrote"]:
            self.journal["wrote"].append(name)
            self.write_journal()
        self.sums[name] = save(self.path(name), content)

    def load(self, name):
        """What utils.save wrote under this name."""
        return utils.load_checkpoint(self.path(name))

    # -------------------------------------------------------------------- steps

    def done(self, step):
        """Whether a step is done and its files are as it left them; if not, it is to be done."""
        entry = self.journal["steps"].get(step)
        for name, checksum in entry["files"].items() if entry else ():
            path = self.path(name)
            found = utils.file_checksum(path)
            if found != checksum:
                what = "is damaged" if found else "is missing"
                print(f"{path}: {what}, so {step} is done again", flush=True)
                self.again.add(step)
                entry = None
                break
        if entry is None:
            self.replaying = False
            return False
        self.remove(f"{step}_progress.pt")  # if it was stopped right after it had finished
        return True

    def finish(self, step, *names, **result):
        """Record a step as done: the names of the files that it leaves, and its plain result.

        Raises Refusal when it was done again, came out otherwise, and others were built on it.
        """
        files = {name: self.sums[name] for name in names}
        steps = self.journal["steps"]
        if step in self.again and step != [*steps][-1] and files != steps[step]["files"]:
            raise Refusal(
                f"--save_dir {self.folder}: {step}, done again, came out otherwise (another "
                f"machine, device or number of threads?), so that what was built on it no longer "
                f"fits; put its files back, or begin anew with --overwrite"
            )
        steps[step] = {"result": result, "files": files}
        self.write_journal()
        self.remove(f"{step}_progress.pt")

    def result(self, step):
        """The result that finish() recorded; None where the step is not done."""
        return self.journal["steps"].get(step, {}).get("result")

    def once(self, step, function, *arguments):
        """function(*arguments), a plain value, computed once in the life of the run."""
        if not self.done(step):
            self.finish(step, value=function(*arguments))
        return self.result(step)["value"]

    def forget(self, beginning):
        """Drop steps whose names begin so, with their files: their state's outcome is recorded."""
        steps = [step for step in self.journal["steps"] if step.startswith(beginning)]
        for step in steps:
            for name in self.journal["steps"].pop(step)["files"]:
                self.remove(name)
        if steps:
            self.write_journal()

    def say(self, words):
        """Print a line, but not again when the run goes on."""
        if not self.replaying:
            print(words, flush=True)

    # -------------------------------------------------------------------- within a step

    def save_progress(self, step, content):
        """Store how far a step is, to go on from there."""
        content = content | {"settings": self.settings}
        self.keep(f"{step}_progress.pt", utils.save, content)
        self.write_journal()  # the seconds

    def progress(self, step, keys):
        """What save_progress() stored last, a dict of these keys; None if nothing, or damaged."""
        path = self.path(f"{step}_progress.pt")
        if not path.exists():
            return None
        try:
            content = utils.load_checkpoint(path)
            if content.pop("settings", None) != self.settings or content.keys() != keys:
                raise Refusal(f"{path}: is of another run")
        except Refusal as damage:
            print(f"{damage}; {step} begins anew", flush=True)
            return None
        return content

    # -------------------------------------------------------------------- records

    def add(self, state, accuracy, density, **more):
        """Record.add, once for each state; the seconds spent in it are filled in."""
        rows = self.journal["rows"]
        if all(row["state"] != state for row in rows):
            spent = time.monotonic() - self.began - sum(row["seconds"] for row in rows)
            super().add(state, accuracy, density, **more, seconds=spent)

    def write(self):
        self.write_journal()
        super().write()

    def write_journal(self):
        self.journal["seconds"] = time.monotonic() - self.began
        self.journal["data_folder"] = self.data_folder()
        text = json.dumps(self.journal | {"checksum": checksum_of(self.journal)}, indent=1)
        utils.save_text(self.path(self.prefix + "run.json"), text)


def checksum_of(content):
    """Of what JSON can hold, whatever the order of its keys."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
