"""Times and ratios of times: `make bench`, or `python benchmarks/times.py NAME ...` for some of the measurements (`--help` lists them).

Prints measured | limit | within as a Markdown table and never fails: a busy machine is slow, not wrong. What can be counted
instead is asserted by the tests. Processor time wherever it can be, the least of several rounds where two are compared."""
import argparse
import os
import resource
import subprocess
import sys
import tempfile
from pathlib import Path
from time import perf_counter, process_time

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("MPLBACKEND", "Agg")
TESTS = Path(__file__).resolve().parents[1] / "tests"
sys.path.insert(0, str(TESTS))


def least_seconds(*calls, rounds=7) -> list[float]:
    "The least processor time of each call, taken in turn: neighbours on a busy machine only add to it."
    least = [float("inf")] * len(calls)
    for _ in range(rounds):
        for k, call in enumerate(calls):
            began = process_time()
            call()
            least[k] = min(least[k], process_time() - began)
    return least


def python_seconds(code: str, rounds: int = 3) -> tuple[float, float]:
    "The least (processor, clock) seconds of a new Python that runs the code."
    found = []
    for _ in range(rounds):
        began, used = perf_counter(), children_seconds()
        subprocess.run([sys.executable, "-c", code], stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, check=True)
        found.append((children_seconds() - used, perf_counter() - began))
    return tuple(map(min, zip(*found)))


def children_seconds() -> float:
    "Processor time of all children that have ended."
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


# ---- the measurements: each gives rows (what, measured, "<" or ">", limit, unit)

def starting():
    (_, nothing), (_, package) = python_seconds("pass"), python_seconds("import fluogen")
    yield "import fluogen, beyond Python itself", max(0.0, package - nothing), "<", 1.5, "s"
    used, clock = python_seconds("from fluogen.cli import main\ntry: main(['--help'])\nexcept SystemExit: pass")
    yield "fluogen --help, processor", used, "<", 0.5, "s"
    yield "fluogen --help, clock", clock, "<", 2.0, "s"
    yield "fluogen doctor, processor", python_seconds("from fluogen.cli import main; main(['doctor'])", 1)[0], "<", 5, "s"


def registry():
    from fluogen.datasets.registry import list_datasets
    yield "reading the registry of data sets", least_seconds(list_datasets)[0], "<", 1, "s"


def specimens():
    from fluogen.core import make_generator
    from fluogen.simulation.structures import STRUCTURES, render
    for name in STRUCTURES:
        took, = least_seconds(lambda: render(name, 12, 128, generator=make_generator(0)), rounds=3)
        yield f"simulating {name}, 128 x 128", took / 12 * 1e3, "<", 40, "ms per image"


def damaged_files():
    from damaged import make_attacks, make_seeds
    from test_io import damaged_copy
    from fluogen.core import make_rng
    from fluogen.io.files import ImageReadError
    from fluogen.io.image import read_image

    def seconds(path, **options):
        began = process_time()
        try:
            read_image(path, **options)
        except ImageReadError:
            pass
        return process_time() - began

    with tempfile.TemporaryDirectory() as place:
        place = Path(place)
        seeds = make_seeds(place)
        slowest = max(seconds(damaged_copy(list(seeds.values())[trial % len(seeds)], place / "damaged", make_rng(1, "damage", trial)))
                      for trial in range(300))
        yield "the slowest of 300 damaged files", slowest, "<", 5, "s"
        for name, data in make_attacks().items():
            (place / "attack.tif").write_bytes(data)
            yield f"refusing: {name}", seconds(place / "attack.tif", axes="TYX" if "pages" in name else None), "<", 1, "s"


def pinball_loss():
    import torch
    from test_quantiles import masked_pinball
    from fluogen.core import make_generator
    from fluogen.models.quantile_heads import pinball
    target = torch.randn(2, 256, 256, generator=make_generator(0, "speed"))
    guess = torch.zeros_like(target).requires_grad_()
    slow, fast = least_seconds(*(lambda loss=loss: loss(guess, target, 0.9).backward() for loss in (masked_pinball, pinball)), rounds=20)
    yield "pinball loss and gradient, against boolean masks", slow / fast, ">", 3, "times as fast"


def table_of_factors():
    import numpy as np
    from test_calibration import draw_image, swept_table
    from fluogen.uncertainty.calibration import EDGES, find_edges, loss_curve
    images = [draw_image(k, 256) for k in range(4)]
    for count, least in ((20, 10), (200, 100)):
        columns = find_edges(np.linspace(0.05, 10, count))
        slow, fast = least_seconds(lambda: swept_table(images, EDGES[columns]), lambda: [loss_curve(*image) for image in images], rounds=3)
        yield f"losses at {count} factors, against a loop over them", slow / fast, ">", least, "times as fast"


def lessons():
    from test_notebooks import execute_lesson
    from tree import library_notebooks, name_of
    for path in library_notebooks():
        used = children_seconds()
        execute_lesson(path)
        yield f"lesson {name_of(path)}, processor", children_seconds() - used, "<", 10, "s"       # 8 for the lesson, 2 for starting Python


MEASURES = (starting, registry, specimens, damaged_files, pinball_loss, table_of_factors, lessons)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("words", nargs="*", metavar="NAME", help=f"of {', '.join(m.__name__ for m in MEASURES)}: only these")
    words = parser.parse_args().words
    chosen = [measure for measure in MEASURES if not words or any(word in measure.__name__ for word in words)]
    within = rows = 0
    print("| what | measured | limit | within |\n|---|---|---|---|")
    for measure in chosen:
        try:
            for what, value, sense, limit, unit in measure():
                good = value < limit if sense == "<" else value > limit
                rows, within = rows + 1, within + good
                print(f"| {what} | {value:.3g} {unit} | {sense} {limit:g} | {'yes' if good else 'NO'} |", flush=True)
        except Exception as error:                  # a report goes on; the tests say what is broken
            print(f"| {measure.__name__} | {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''} | | NO |", flush=True)
    print(f"\n{within} of {rows} within their limits")


if __name__ == "__main__":
    main()
