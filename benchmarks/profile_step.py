"""Where the time of a KD step goes, and whether torch.compile or a CUDA graph would shorten it.

    python benchmarks/profile_step.py                      the step of task 3, all ways
    python benchmarks/profile_step.py --ways eager         without compiling
    python benchmarks/profile_step.py --out profile.json   write the figures as JSON too, after each
                                                           way; those that are there are kept

In fp32 and bf16, and on CUDA in fp32 without TF32 too, which PyTorch uses for convolutions unless
told otherwise. The ways:

    eager     as the scripts compute
    compile   the network's body under torch.compile
    graph     the whole step as a CUDA graph, with static buffers into which each batch is copied.
              SGD can be captured, but its learning rate is then fixed: a graph for each rate

Each is also run once under torch.profiler. CUDA: the time in kernels, and the number of launches;
what the kernels leave of a step's time is spent waiting for launches. CPU: the operators that take
longest. A way that fails is recorded with the reason.
"""

import statistics
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import bench
import torch
from tqdm import tqdm

import trainer
from runtime.device import pick_device
from runtime.errors import UserError, first_line, one_line
from runtime.process import run_script
from runtime.run import device_name

PRECISIONS = {"fp32": "ours_fp32", "bf16": "ours_bf16", "fp32, no TF32": "ours_fp32"}  # bench.WAYS
TASK = 3
TF32 = torch.backends.cudnn.allow_tf32  # of convolutions, as PyTorch and the scripts have it
TOP = 6  # operators shown of a CPU

# ------------------------------------------------------------------------------ the ways
#
# Each takes (precision, width, device) and returns a function that takes a step.


def make_step(precision, width, device):
    """A function that takes a step of task TASK; its network, and its batches."""
    torch.backends.cudnn.allow_tf32 = TF32 and "no TF32" not in precision
    torch.manual_seed(0)
    model, optimizer, sub, batches = bench.kd_setting(PRECISIONS[precision], width, device, TASK)

    def step():
        bench.descend(optimizer, trainer.kd_loss(model, TASK, sub, batches)[0])

    return step, model, batches


def eager(precision, width, device):
    return make_step(precision, width, device)[0]


def compiled(precision, width, device):
    step, model, _ = make_step(precision, width, device)
    model.body = torch.compile(model.body)
    return step


def graph(precision, width, device):
    if device.type != "cuda":
        raise UserError("needs CUDA")
    torch.cuda.set_device(device)
    step, _, static = make_step(precision, width, device)
    others = [[tensor.clone() for tensor in batch] for batch in static]
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):  # what must not be captured: momentum is made, libraries start
        for _ in range(3):
            step()
    torch.cuda.current_stream(device).wait_stream(stream)
    captured = torch.cuda.CUDAGraph()
    with torch.cuda.graph(captured):
        step()

    def replay():
        for batch, other in zip(static, others):
            for buffer, tensor in zip(batch, other):
                buffer.copy_(tensor)
        captured.replay()

    return replay


WAYS = {"eager": eager, "compile": compiled, "graph": graph}

# ------------------------------------------------------------------------------ measuring


def measure(precision, way, args, device):
    """The row of a way in a precision; with the reason in place of figures if it fails."""
    row = {"name": f"{precision}: {way}", "precision": precision, "way": way}
    try:
        step = WAYS[way](precision, args.width, device)
        row["first_seconds"] = bench.timed(device, step)  # compiles
        steps = 20 if device.type == "cuda" else 3
        seconds = [bench.timed_step(device, steps, step) for _ in range(args.repeats)]
        return row | {"seconds": statistics.median(seconds)} | profile(device, step)
    except Exception as error:  # a compiler may raise anything
        return row | {"failed": one_line(first_line(error), 200)}


def profile(device, step):
    """Where a step spends its time, by torch.profiler."""
    with torch.profiler.profile() as profiler:  # of the CPU, and of CUDA where it is there
        bench.timed(device, step)
    events = [each for each in profiler.key_averages() if not each.is_user_annotation]
    if device.type != "cuda":
        total = sum(each.self_cpu_time_total for each in events)
        longest = sorted(events, key=lambda each: -each.self_cpu_time_total)[:TOP]
        return {"shares": {each.key: each.self_cpu_time_total / total for each in longest}}
    kernels = [each for each in events if each.device_type == torch.autograd.DeviceType.CUDA]
    return {
        "kernel_seconds": sum(each.self_device_time_total for each in kernels) / 1e6,
        "kernels": sum(each.count for each in kernels),
        "launches": sum(each.count for each in events if "Launch" in each.key),
    }


# ------------------------------------------------------------------------------ the report


def table(rows):
    """The rows as a Markdown table; the ratio is to the eager step in the same precision."""
    images = bench.images_of("kd_step")
    base = {row["precision"]: row.get("seconds") for row in rows if row["way"] == "eager"}
    names = "precision", "way", "step", "images/s", "ratio", "first step", "where the time goes"
    lines = [f"| {' | '.join(names)} |", "|---" * len(names) + "|"]
    for row in rows:
        cells = [row["precision"], row["way"], *[""] * 4, note(row)]
        if s := row.get("seconds"):
            cells[2:4] = f"{1e3 * s:.2f} ms", f"{images / s:.0f}"
            cells[4] = f"{base[row['precision']] / s:.2f}" if base.get(row["precision"]) else ""
            cells[5] = f"{row['first_seconds']:.1f} s"
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def note(row):
    """Where a row's time goes, or why there is none."""
    if "failed" in row:
        return f"failed: {row['failed']}".replace("|", "\\|")
    if "shares" in row:
        shares = row["shares"].items()
        return ", ".join(f"{100 * share:.0f} % {one_line(name, 40)}" for name, share in shares)
    share = 100 * row["kernel_seconds"] / row["seconds"]
    return f"{share:.0f} % in {row['kernels']} kernels; {row['launches']} launches"


def conditions(args, device):
    """What the figures depend on; of TF32, what the scripts leave as it is."""
    return {
        "device": device_name(device),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "threads": torch.get_num_threads(),
        "width": args.width,
        "tf32_convolutions": TF32,
        "tf32_products": torch.backends.cuda.matmul.allow_tf32,
    }


def parse(argv):
    parser = bench.make_parser(__doc__, repeats=5)
    default = {"default": ",".join(WAYS), "help": "default: %(default)s"}
    parser.add_argument("--ways", metavar="A,B,..", **default)
    args = parser.parse_args(argv)
    args.ways = args.ways.split(",")
    for way in args.ways:
        if way not in WAYS:
            raise UserError(f"--ways {way}: unknown, give some of {', '.join(WAYS)}")
    return args


def main(argv=None):
    args = parse(argv)
    device = pick_device(args)
    results = conditions(args, device)
    print(", ".join(f"{key} {value}" for key, value in results.items()), flush=True)
    rows = bench.earlier_rows(args.out, results) if args.out else {}
    precisions = [each for each in PRECISIONS if device.type == "cuda" or "TF32" not in each]
    pairs = [(precision, way) for precision in precisions for way in args.ways]
    for precision, way in tqdm(pairs, disable=None, leave=False):
        if "seconds" in rows.get(f"{precision}: {way}", {}):  # one that failed is tried again
            continue
        row = measure(precision, way, args, device)
        rows[row["name"]] = row
        tqdm.write(table([row]).splitlines()[-1])
        if args.out:
            bench.save_rows(args.out, results, rows)
    print(table([*rows.values()]))


if __name__ == "__main__":
    run_script(main)
