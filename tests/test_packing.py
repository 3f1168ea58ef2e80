"Packed weights: how exact each way is, and what is refused."
import numpy as np
import pytest
import torch

from fluogen.models.packing import SMALL_TENSOR, PackingError, pack_state, unpack_state


def random_state(seed=0, size=1.0):
    generator = torch.Generator().manual_seed(seed)
    shapes = {"conv": (32, 24, 3, 3), "linear": (64, 48), "bias": (64,), "norm": (7,), "tiny": (4, 4),
              "one": ()}
    return {name: torch.randn(shape, generator=generator) * size for name, shape in shapes.items()}


def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


@pytest.mark.parametrize("size", [1e-4, 1.0, 300.0])
def test_fp32_is_exact_and_fp16_is_half_precision(size):
    state = random_state(size=size)
    assert equal(unpack_state(pack_state(state, "fp32")), state)
    back = unpack_state(pack_state(state))
    for name, value in state.items():
        assert back[name].dtype == torch.float32 and back[name].shape == value.shape
        assert ((back[name] - value).abs() <= value.abs() * 2**-11 + 2**-25).all()


def test_eight_bits_are_off_by_half_a_step_of_their_row():
    state = random_state()
    packed = pack_state(state, "int8")
    back = unpack_state(packed)
    for name in ("conv", "linear"):
        assert packed[name + ":q"].dtype == torch.int8 and packed[name + ":q"].shape == state[name].shape
        value = state[name].flatten(1)
        step = value.abs().amax(1, keepdim=True) / 127
        assert ((back[name].flatten(1) - value).abs() <= 0.5 * step + 127 * step * 2**-11 + 1e-7).all()
    for name in ("bias", "norm", "tiny", "one"):                        # too small to be worth it
        assert state[name].numel() < SMALL_TENSOR and torch.equal(back[name], state[name].half().float())


def test_rows_of_zeros_and_of_dust():
    rows = torch.zeros(4, 200)
    rows[1], rows[2, 3] = 1e-6, 5.0
    back = unpack_state(pack_state({"w": rows}, "int8"))["w"]
    assert not back[0].any() and not back[3].any() and back[2, 3] == pytest.approx(5, rel=1e-2)
    assert (back - rows).abs().max() < 5 / 127


def test_differences_leave_out_what_did_not_change():
    base, tuned = random_state(0), random_state(0)
    tuned["linear"] = tuned["linear"] + 0.01 * random_state(1)["linear"]
    packed = pack_state(tuned, "fp16", base)
    assert list(packed) == ["linear:d"]
    back = unpack_state(packed, base)
    assert torch.equal(back["conv"], base["conv"])
    assert (back["linear"] - tuned["linear"]).abs().max() < 0.01 * 8 * 2**-11
    assert pack_state(base, base=base) == {} and equal(unpack_state({}, base), base)


def test_new_names_and_other_shapes_are_stored_whole():
    base, tuned = random_state(0), random_state(0)
    tuned["conv"], tuned["new"] = torch.ones(8, 3), torch.ones(5)
    packed = pack_state(tuned, base=base)
    assert set(packed) == {"conv", "new"}
    back = unpack_state(packed, base)
    assert torch.equal(back["conv"], torch.ones(8, 3)) and torch.equal(back["new"], torch.ones(5))


@pytest.mark.parametrize("rank", [1, 4, 9])
def test_low_rank_is_the_best_of_its_rank(rank):
    base, change = random_state(0), random_state(5)
    tuned = {k: base[k] + change[k] for k in base}
    packed = pack_state(tuned, base=base, rank=rank)
    for name in ("conv", "linear"):
        matrix = (tuned[name] - base[name]).flatten(1).double().numpy()
        best = np.sqrt((np.linalg.svd(matrix, compute_uv=False)[rank:] ** 2).sum())         # Eckart-Young
        found = float((unpack_state(packed, base)[name] - tuned[name]).double().norm())
        assert best <= found * (1 + 1e-6) and found < best * 1.001
        assert packed[name + ":d:u"].shape == (len(matrix), rank) and len(packed[name + ":d:v"]) == rank
    whole = {"w": torch.ones(64, 64)}
    twice = {"w": torch.ones(64, 64) * 2}
    assert set(pack_state(twice, base=whole, rank=32)) == {"w:d"}       # not smaller: not done


def test_packing_shrinks():
    base, tuned = random_state(0), random_state(1)
    size = {name: sum(v.nbytes for v in pack_state(tuned, base=base, **how).values())
            for name, how in {"fp32": {"method": "fp32"}, "fp16": {}, "int8": {"method": "int8"},
                              "rank": {"rank": 2}}.items()}
    assert size["fp32"] > 1.9 * size["fp16"] > 3.4 * size["int8"] > 3.4 * size["rank"]


def test_the_state_is_not_touched():
    state, base = random_state(), random_state(1)
    copies = {k: v.clone() for k, v in state.items()}, {k: v.clone() for k, v in base.items()}
    unpack_state(pack_state(state, "int8", base, rank=2), base)
    assert equal(state, copies[0]) and equal(base, copies[1])


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_numbers_that_are_none(bad):
    state = random_state()
    state["conv"][3, 2, 1, 0] = bad
    with pytest.raises(PackingError, match="conv: weights are not finite"):
        pack_state(state)


@pytest.mark.parametrize("method", ["fp16", "int8"])
def test_numbers_too_large_for_half_precision(method):
    "1e7 would become infinity in 16 bits, or be clipped in eight: refused rather than shipped."
    state = random_state()
    state["linear"][0, 0] = 1e7
    state["bias"][0] = 1e5
    with pytest.raises(PackingError, match="too large"):
        pack_state(state, method)
    assert equal(unpack_state(pack_state(state, "fp32")), state)


def test_other_refusals():
    with pytest.raises(PackingError, match="unknown packing"):
        pack_state(random_state(), "int4")
    tuned, base = random_state(1), random_state(0)
    with pytest.raises(PackingError, match="without its base"):
        unpack_state(pack_state(tuned, base=base))
