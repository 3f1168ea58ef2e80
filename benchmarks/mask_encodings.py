"""Masks to images: `python benchmarks/mask_encodings.py` prints a Markdown table; `--help` lists the options.

What a network is shown of a mask, and whether the backbone is tuned with its branch or frozen, after as many steps each: the denoising loss
and the overlap of drawn objects with their masks, both on scenes or groups set aside. Simulated nuclei and cocci, or pairs of a manifest."""
import argparse
import tempfile
from dataclasses import replace
from functools import partial

import torch

from fluogen.preprocessing.labels import LABEL_NORMS, show_labels
from fluogen.simulation.pairs import simulate_targets
from fluogen.models.zoo import load_weights
from fluogen.datasets.pairs import PairBatch
from fluogen.training.fit import fit
from fluogen.datasets.pairs import read_mask_pair
from fluogen.metrics.segmentation import measure_following
from fluogen.training.fit import MASK_CONFIG
from fluogen.training.learners import MaskLearner
from fluogen.datasets.pairs import gather_tiles
from fluogen.tasks.finetune import split_pairs

PROMPTS = ["Nucleus of BPAE", "DNA of U2OS", "Nuclei of PC-3", "S. aureus"]


def draw_pairs(norm: str, split: str, n: int) -> PairBatch:
    "Simulated images of 128² and their masks, those with objects."
    made = simulate_targets(PROMPTS, n, 128, seed=1, split=split, instances=True)
    rows = [i for i in range(n) if made.instances[i].any()]
    condition = torch.stack([torch.from_numpy(show_labels(made.instances[i].numpy(), norm)) for i in rows])
    return PairBatch(made.target[rows], condition, [made.prompts[i] for i in rows], [f"{split} {i}" for i in rows])


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dataset", help="manifest of images and masks (default: simulated)")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--norms", nargs="+", default=[*LABEL_NORMS])
    parser.add_argument("--frozen", type=int, nargs="+", default=[0, 1], help="0: the backbone is tuned too; 1: frozen, as in the paper")
    options = parser.parse_args()
    weights = load_weights("fluogen-nano")
    print("| shown | backbone | loss before | loss after | overlap, drawn | overlap, measured |\n|---|---|---|---|---|---|")
    for norm in options.norms:
        if options.dataset:
            training, held = split_pairs(gather_tiles(options.dataset, partial(read_mask_pair, norm=norm))[0])
        else:
            training, held = draw_pairs(norm, "train", 192), draw_pairs(norm, "validation", 16)
        for frozen in options.frozen:
            learner = MaskLearner(weights, norm, frozen=bool(frozen))
            before = learner.validation_loss(learner.modules, held)
            config = replace(MASK_CONFIG, steps=options.steps, validate_every=options.steps, patience=0)
            fit(learner, training, held, config, tempfile.mkdtemp(), progress=False)
            some = held.take(range(min(8, len(held))))
            drawn = learner.restore(learner.modules, some.condition, some.prompts)
            print(f"| {norm} | {'frozen' if frozen else 'tuned'} | {before:.4f} | {learner.validation_loss(learner.modules, held):.4f} | "
                  f"{measure_following(drawn, some.condition):.2f} | {measure_following(some.target, some.condition):.2f} |", flush=True)


if __name__ == "__main__":
    main()
