"report.figure: one scale a row, the same field under every panel, small files."
import matplotlib
import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib_scalebar.scalebar import ScaleBar
from PIL import Image
from scipy import ndimage

from fluogen.figures.fig5b_how_many import draw_curves
from fluogen.core import FluogenError
from fluogen.report.plotting import (
    LUT_POINTS, FigureError, check_figure_path, choose_zoom, display_range, get_lut, image_grid, figure_style,
    reduce_colours, save_figure)
from fluogen.report.widgets import LiveCurve


def scene(seed, size=128):
    return ndimage.gaussian_filter(np.random.default_rng(seed).random((size, size)), 1.5)


def panels(rows=("ER", "CCPs"), columns=("widefield", "a", "truth")):
    return {row: {column: scene(i * 7 + j) for j, column in enumerate(columns)} for i, row in enumerate(rows)}


@pytest.mark.parametrize(("prompt", "lut"), [
    ("ER", "magenta"), ("ER of COS-7", "magenta"), ("Endoplasmic reticulum", "magenta"), ("ER of U2OS", "green"),
    ("F-actin of COS-7", "red-hot"), ("F-actin of BPAE", "green"), ("microtubules", "blue-hot"), ("CCPs", "green"),
    ("Nuclei of PC-3", "cyan"), ("Mitochondria of BPAE", "red"), ("RNA of U2OS", "yellow"), ("other", "gray"),
    ("blue_hot", "blue-hot")])
def test_colours_of_the_published_figures(prompt, lut):
    assert get_lut(prompt).name == lut


@pytest.mark.parametrize("name", LUT_POINTS)
def test_tables_start_black_and_grow_brighter(name):
    colours = get_lut(name)(np.arange(256))[:, :3]
    assert colours[0].sum() == 0 and (np.diff(colours @ [0.3, 0.59, 0.11]) > -1e-9).all()


def test_zoom_is_the_best_of_all_rectangles():
    image = scene(3, 40)
    x, y, width = choose_zoom(image, field_um=40.0, share=0.4)
    edges = np.square(np.diff(image, axis=0)[:, :-1]) + np.square(np.diff(image, axis=1)[:-1])
    sums = {(left, top): edges[top:top + 8, left:left + 16].sum() for top in range(32) for left in range(24)}
    assert max(sums, key=sums.get) == (round(x), round(y)) and width == 16


def test_zoom_stays_inside_for_any_shape():
    for shape in ((3, 3), (5, 40), (40, 5), (64, 63)):
        x, y, width = choose_zoom(np.ones(shape), field_um=shape[1])
        assert 0 <= x <= x + width <= shape[1] and 0 <= y < shape[0]


def test_one_range_a_row_and_one_field():
    drawn = panels()
    drawn["ER"]["widefield"] = drawn["ER"]["widefield"][::2, ::2] * 3
    figure = image_grid(drawn, {"ER": 4.0, "CCPs": 8.0}, reference="truth")
    images = [axis.images[0] for axis in figure.axes]
    assert len(images) == 12                                     # 2 rows x 3 columns, and the strips
    row = images[:6]
    assert {image.get_clim() for image in row} == {display_range(drawn["ER"]["truth"])}
    assert {tuple(image.get_extent()) for image in row} == {(0, 4.0, 4.0, 0)}
    x, y, width = choose_zoom(drawn["ER"]["truth"], 4.0)
    for panel, strip in zip(figure.axes[:3], figure.axes[3:6], strict=True):
        assert strip.get_xlim() == pytest.approx((x, x + width)) and strip.get_ylim() == pytest.approx((y + width / 2, y))
        box = panel.patches[0]
        assert (*box.get_xy(), box.get_width(), box.get_height()) == pytest.approx((x, y, width, width / 2))
        assert panel.get_xlim() == (0, 4.0)


def test_scale_bar_has_its_length():
    figure = image_grid(panels(("ER",)), 4.0, reference="truth")
    figure.canvas.draw()
    axis = figure.axes[0]
    bar, = [artist for artist in axis.artists if isinstance(artist, ScaleBar)]
    assert bar.dx == 1 and bar.units == "um"                     # the axis itself is in micrometres
    assert axis.get_xlim() == (0, 4.0) and axis.get_ylim() == (4.0, 0)


@pytest.mark.parametrize("corner", [(0, 0), (0, 3.1), (2.2, 3.1), (1.5, 3.1), (0.2, 2.6), (2.2, 0)])
def test_the_bar_does_not_lie_over_the_frame(corner):
    dark = {"ER": {"truth": np.eye(64) * 1e-6}}
    figure = image_grid(dark, 4.0, reference="truth", zooms={"ER": (*corner, 1.8)}, ranges={"ER": (0, 1)})
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    pixels = np.asarray(canvas.buffer_rgba())[::-1, :, :3].min(2)               # as matplotlib counts, from below
    panel, frame = figure.axes[0].get_window_extent(), figure.axes[0].patches[0].get_window_extent()
    bright = [(pixels[int(box.y0) + 3:int(box.y1) - 2, int(box.x0) + 3:int(box.x1) - 2] > 200).sum() for box in (frame, panel)]
    assert bright[0] == 0 and bright[1] > 50                                    # the bar is somewhere else


@pytest.mark.parametrize("columns", [2, 7])
def test_a_caption_lies_below_the_panels_and_beside_the_profile(columns):
    words = "Simulated scenes and microscopes, held out; the first of 4 fields a structure; frames are shown larger below."
    figure = image_grid(panels(columns=("truth", *"abcdefg"[:columns - 1])), 4.0, reference="truth", profile="laptop", caption=words)
    FigureCanvasAgg(figure).draw()
    caption, corner = (next(text for text in figure.texts if text.get_text().startswith(start)) for start in ("Simulated", "profile"))
    assert caption.get_text().replace("\n", " ") == words and ("\n" in caption.get_text()) == (columns == 2)
    box = caption.get_window_extent()
    assert not box.overlaps(corner.get_window_extent()) and 0 <= box.x0 and box.x1 <= figure.bbox.x1 and box.y0 >= 0
    assert not any(box.overlaps(axis.get_window_extent()) for axis in figure.axes)


def test_no_legend_lies_over_a_curve():
    live = LiveCurve(start=28.9, live=False)
    for step, value in ((40, -28.4), (80, -28.9), (120, -28.95)):
        live({"event": "validation", "step": step, "value": value})
    rows = [{"method": m, "seed": s, "pairs": n, "ever": [20.0 + s + k + n / 30]} for s in (0, 1) for n in (2, 5, 10, 30)
            for k, m in enumerate(("fluogen", "norms", "low-rank", "anchored", "scratch", "care"))]
    rows += [{"method": "untuned", "seed": s, "pairs": 0, "ever": [20.0]} for s in (0, 1)]
    both, one = draw_curves({"rows": rows}, "laptop"), draw_curves({"rows": [r for r in rows if r["method"] in ("fluogen", "care")]})
    for figure in (live.figure(), both, one):
        FigureCanvasAgg(figure).draw()
        legends = [*figure.legends, *(axis.get_legend() for axis in figure.axes if axis.get_legend())]
        boxes = [legend.get_window_extent() for legend in legends]
        assert boxes and not any(box.overlaps(axis.get_window_extent()) for box in boxes for axis in figure.axes)
        texts = [text.get_window_extent() for text in (*figure.texts, figure._supxlabel) if text is not None]
        assert not any(box.overlaps(other) for box in boxes for other in texts)
        assert all(0 <= box.x0 and box.x1 <= figure.bbox.x1 for box in boxes)


def test_zooms_given_or_none():
    given = image_grid(panels(("ER",)), 4.0, reference="truth", zooms={"ER": (1, 2, 0.5)})
    assert given.axes[3].get_xlim() == (1, 1.5)
    assert len(image_grid(panels(("ER",)), 4.0, reference="truth", zooms={}).axes) == 3


def test_a_missing_method_says_so():
    drawn = panels(("ER",))
    drawn["ER"]["a"] = None
    axis = image_grid(drawn, 4.0, reference="truth").axes[1]
    assert not axis.images and axis.texts[0].get_text() == "not run"


@pytest.mark.parametrize(("change", "field", "word"), [
    ({"truth": None}, 4.0, "no reference panel"), ({"a": np.ones((8, 8, 3))}, 4.0, "not a grey image"),
    ({"a": np.ones((8, 16))}, 4.0, "same field"), ({}, 0, "no field width"), ({}, {"CCPs": 4.0}, "no field width"),
    ({"truth": np.full((8, 8), np.nan), "a": None, "widefield": None}, 4.0, "no finite pixel")])
def test_what_cannot_be_compared_is_refused(change, field, word):
    with pytest.raises(FigureError, match=word) as caught:
        image_grid({"ER": panels()["ER"] | change}, field, reference="truth")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("profile", "seen"), [("paper", []), ("laptop", ["profile: laptop"]),
                                               ("smoke", ["profile: smoke", "smoke test\nnot a result"])])
def test_profile_in_the_corner(profile, seen):
    figure = image_grid(panels(("ER",)), 4.0, reference="truth", profile=profile)
    assert [text.get_text() for text in figure.texts if text.get_text() != "ER"] == seen


def test_pictures_stay_small_and_readable(tmp_path):
    columns = ("widefield", "RL", "CARE", "DFCAN", "RCAN", "FluoGen", "truth")
    noisy = {row: {c: np.random.default_rng(1).random((256, 256)) for c in columns} for row in ("ER", "F-actin", "CCPs", "Microtubules")}
    path = save_figure(image_grid(noisy, 8.0, reference="truth"), tmp_path / "figure.png")
    assert path.stat().st_size <= 300_000 and Image.open(path).size[0] >= 400     # pure noise is the worst case
    assert [entry.name for entry in tmp_path.iterdir()] == ["figure.png"]


def test_few_colours_draw_no_contour_lines(tmp_path):
    "Soft structures in the colours of figure 3, of which a palette chosen without care leaves steps."
    import io
    prompts = ("RNA of U2OS", "ER of COS-7", "Nuclei of PC-3", "ER of U2OS", "F-actin of COS-7")
    soft = {p: {str(i): ndimage.gaussian_filter(scene(5 * i + k) ** 2, 4) for i in range(2)} for k, p in enumerate(prompts)}
    figure = image_grid(soft, 8.0, reference="0")
    path, raw = save_figure(figure, tmp_path / "figure.png", max_kb=90), io.BytesIO()
    figure.savefig(raw, format="png", dpi=round(Image.open(path).info["dpi"][0]))
    few, all_colours = (np.asarray(Image.open(file).convert("RGB"), float) for file in (path, raw))
    assert Image.open(path).mode == "P" and np.percentile(np.abs(few - all_colours).max(2), 99) <= 20


def test_style_leaves_no_trace():
    before = dict(matplotlib.rcParams)
    with figure_style():
        assert matplotlib.rcParams["font.size"] == 8
    assert dict(matplotlib.rcParams) == before


def test_a_picture_never_replaces_what_this_package_did_not_draw(tmp_path):
    import matplotlib.pyplot as plt
    figure, ours, theirs = plt.figure(figsize=(1, 1)), tmp_path / "sheet.png", tmp_path / "cell.png"
    check_figure_path(ours)
    for limit in (300, 1):                                                  # whole, and in 256 colours
        save_figure(figure, ours, dpi=60, max_kb=limit)
        check_figure_path(ours)
    Image.new("L", (4, 4)).save(theirs)
    (tmp_path / "notes.png").write_text("mine")
    for wrong, said in ((theirs, "did not draw"), (tmp_path / "notes.png", "did not draw"), (tmp_path / "raw.tif", "ends in .png")):
        with pytest.raises(FluogenError, match=said):
            check_figure_path(wrong)
    with pytest.raises(FluogenError, match="a figure is saved as PNG"):
        save_figure(figure, tmp_path / "raw.tif")
    plt.close(figure)


def test_a_small_ramp_beside_large_ones_keeps_its_steps():
    rng, picture = np.random.default_rng(0), np.zeros((400, 256, 3), np.uint8)
    picture[100:394] = rng.integers(0, 256, (294, 256, 1)) * np.array([1, 0, 0])
    picture[394:] = np.arange(256)[None, :, None] * np.array([0, 1, 1])           # a nucleus among filaments
    picture = Image.fromarray(picture)
    error = lambda made: abs(np.asarray(made.convert("RGB")).astype(int) - np.asarray(picture))[394:].mean()
    assert error(reduce_colours(picture)) < 0.7 * error(picture.quantize(256, kmeans=1, dither=Image.Dither.NONE))
