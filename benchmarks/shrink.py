"""What exact shrinking (models/shrink.py) saves: parameters, multiply-accumulates, images/s.

    python benchmarks/shrink.py ticket.npz other.npz --data data/cifar10
    python benchmarks/shrink.py ticket.npz --threads 1 --batch_sizes 1 --onnx

Each checkpoint or packed file is measured in three forms, which take turns; shown are medians:

masked   as test.py computes it, with its masks multiplied into the weights beforehand
folded   the same channels, with BatchNorm folded as shrinking does it: what is not due to narrowing
shrunk   what tools.pack --shrink writes

with --onnx also masked and shrunk as tools.export writes them, by ONNX Runtime. Measured is the way
from uint8 images to logits, on random pixels. First masked and shrunk are compared on all test
images, if the data set is prepared (--data), else on random images. Prints a table in Markdown.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import runtime.threads  # isort: skip  # noqa: F401  (OpenMP reads its settings with torch)

import itertools
import statistics
import time
from argparse import Namespace

import torch
from tqdm import tqdm

import pruning_utils
from models.cost import layers_of, macs, parameters
from models.shrink import shrink_network
from runtime import cli, packed
from runtime.errors import UserError
from runtime.process import run_script
from runtime.run import device_name
from tools import export
from tools.pack import read_network, require, resolve_state


def parse(argv):
    parser = cli.Parser(__doc__)
    flag = parser.add_argument
    flag("files", nargs="+", type=cli.path, metavar="FILE", help="checkpoint or packed file")
    flag("--data", type=cli.path, metavar="DIR", help="the prepared set (default data/<dataset>)")
    message = f"threads of PyTorch {cli.DEFAULT}"
    flag("--threads", type=cli.int_list, default="1,2", metavar="N,N", help=message)
    message = f"images at once {cli.DEFAULT}"
    flag("--batch_sizes", type=cli.int_list, default="1,256", metavar="N,N", help=message)
    message = f"turns of each form {cli.DEFAULT}"
    flag("--repeats", type=cli.int_range(1), default=7, metavar="N", help=message)
    message = "seconds of a repeat, at least (default %(default)s)"
    flag("--seconds", type=cli.positive, default=1.0, metavar="S", help=message)
    flag("--onnx", action="store_true", help="ONNX Runtime too")
    args = parser.parse_args(argv)
    for name in ("threads", "batch_sizes"):
        numbers = getattr(args, name)
        if not numbers or 0 in numbers:
            found = repr(",".join(map(str, numbers)))
            raise UserError(f"--{name}: found {found}, give numbers of at least 1, such as 1,2")
    if args.onnx:
        export.require_onnx("--onnx", ["onnxruntime"])
    return args


def read(path):
    """The header of a file, and {form: Predictor}."""
    header, model = read_network(path)
    require(path, header, "mean", "std", "image_size")
    if packed.is_shrunk(header):
        raise UserError(f"{path}: is a shrunk network, give the file it was made from")
    size, state = tuple(header["image_size"]), resolve_state(Namespace(state=None), header)
    _, full = read_network(path)
    for each in (model, full):
        export.bake_masks(each)
    for weight in pruning_utils.weights(full).values():
        weight[weight == 0] = 1e-6  # nothing is removed
    folded, shrunk = (shrink_network(each, size) for each in (full, model))
    forms = {"masked": model, "folded": folded, "shrunk": shrunk}
    return header, {k: export.Predictor(each.eval(), header, state) for k, each in forms.items()}


def onnx_session(predictor, header, threads):
    """A function of images, uint8 [n,H,W,3]."""
    example = torch.zeros(2, *header["image_size"], 3, dtype=torch.uint8)
    torch.set_num_threads(threads)
    with export.quiet():
        return export.load_exported(".onnx", export.to_onnx(predictor, example, {}))


def images_per_second(run, images, seconds):
    """Of at least one batch and `seconds`."""
    count, start = 0, time.perf_counter()
    while count == 0 or time.perf_counter() - start < seconds:
        run(images)
        count += 1
    return count * len(images) / (time.perf_counter() - start)


def speeds(header, forms, args, bar):
    """{form: [images/s by threads and batch size]}."""
    columns = list(itertools.product(args.threads, args.batch_sizes))
    found = {}
    for threads, batch_size in columns:
        shape = batch_size, *header["image_size"], 3
        images = torch.randint(0, 256, shape, dtype=torch.uint8)
        runs = dict(forms)
        if args.onnx:
            for name in ("masked", "shrunk"):
                runs[f"{name}, ONNX Runtime"] = onnx_session(forms[name], header, threads)
        torch.set_num_threads(threads)
        turns = {name: [] for name in runs}
        for _, (name, run) in itertools.product(range(args.repeats + 1), runs.items()):
            bar.set_postfix_str(f"{name}, {threads} threads, batch size {batch_size}")
            turns[name].append(images_per_second(run, images, args.seconds))
            bar.update()
        for name, values in turns.items():  # without the first, in which memory is new
            found.setdefault(name, []).append(statistics.median(values[1:]))
    return found


def main(argv=None):
    args = parse(argv)
    columns = [
        f"threads {t}, batch {b}" for t, b in itertools.product(args.threads, args.batch_sizes)
    ]
    heads = ["file", "density, %", "form", "parameters", "MACs", *columns]
    lines = [f"| {' | '.join(heads)} |", f"|{'---|' * len(heads)}"]
    networks = {path: read(path) for path in args.files}
    forms = 5 if args.onnx else 3
    total = len(args.files) * len(columns) * forms * (args.repeats + 1)
    with tqdm(total=total, disable=None) as bar, torch.inference_mode():
        for path, (header, predictors) in networks.items():
            source = Namespace(checkpoint=path, data=args.data)
            state = predictors["masked"].state
            images, what = export.pick_images(source, header, state, 10**9)
            pair = (predictors[name] for name in ("masked", "shrunk"))
            difference, scale, same = export.compare(*pair, images)
            bar.write(
                f"{path}: masked and shrunk differ by at most {difference:.1e} (the logits go up "
                f"to {scale:.3g}), the same class for {same} of {len(images)} {what}"
            )
            for form, row in speeds(header, predictors, args, bar).items():
                network = predictors[form.partition(",")[0]].model
                count = macs(layers_of(network, tuple(header["image_size"])))
                cells = [Path(path).name, f"{header['density']:.2f}", form]
                cells += [f"{parameters(network):,}", f"{count / 1e6:,.2f} M"]
                lines.append(f"| {' | '.join(cells + [f'{value:,.0f}' for value in row])} |")
    print("\n".join(lines))
    print(f"images/s; {device_name(torch.device('cpu'))}, PyTorch {torch.__version__}")
    return lines


if __name__ == "__main__":
    run_script(main)
