"""Pairs a second: `python benchmarks/simulation_speed.py` prints a Markdown table; `--help` lists the options.

Each cell: pictures a second by the clock (CPU milliseconds a picture, summed over threads). On a busy machine
the second number is the one to trust: two free cores reach about 2000 divided by it."""
import argparse
import time

import torch

from fluogen.simulation.pairs import simulate_pairs, simulate_targets
from fluogen.simulation.structures import STRUCTURES

SR = ("microtubules", "factin", "er", "ccps")


def measure_rate(call, n, device, repeats):
    "Median over the repeats, after one warm-up, of (pictures a second, CPU ms a picture)."
    call(seed=0)
    rates = []
    for seed in range(1, repeats + 1):
        wall, cpu = time.perf_counter(), time.process_time()
        call(seed=seed)
        if device.startswith("cuda"):
            torch.cuda.synchronize()
        rates.append((n / (time.perf_counter() - wall), (time.process_time() - cpu) / n * 1e3))
    return [sorted(column)[repeats // 2] for column in zip(*rates)]


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--n", type=int, default=64, help="pictures a call")
    parser.add_argument("--size", type=int, default=128, help="side of the target in pixels")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--each", action="store_true", help="a row for every structure too")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    rows = {"the four of the task": list(SR), "all structures": list(STRUCTURES)}
    rows |= {name: [name] for name in STRUCTURES} if options.each else {}
    print(f"{options.n} pictures of {options.size}x{options.size} a call, {options.device}, "
          f"{torch.get_num_threads()} threads, torch {torch.__version__}\n")
    print("| structures | targets | widefield pairs | pairs with nine raw frames |\n|---|---|---|---|")
    for title, names in rows.items():
        shared = dict(size_px=options.size, device=options.device)
        calls = [lambda seed: simulate_targets(names, options.n, seed=seed, **shared),
                 lambda seed: simulate_pairs(names, options.n, seed=seed, **shared),
                 lambda seed: simulate_pairs(names, options.n, seed=seed, raw_frames=True, **shared)]
        rates = [measure_rate(call, options.n, options.device, options.repeats) for call in calls]
        cells = [f"{rate:.0f}/s ({cpu_ms:.1f} ms)" for rate, cpu_ms in rates]
        print(f"| {title} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
