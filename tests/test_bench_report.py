"""benchmarks.fits, plots, rows and report, on made-up runs."""

from __future__ import annotations

import copy
import math
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from benchmarks import api, fits, plots, report, results, rows, runs, sources
from benchmarks.__main__ import main
from tests import made_up_runs
from tests.made_up_runs import row, stats

KINDS = {
    "kernels": made_up_runs.kernels,
    "scaling": made_up_runs.scaling,
    "model": made_up_runs.models,
    "train": lambda: made_up_runs.models("train"),
}


@pytest.mark.parametrize("kind", KINDS)
def test_made_up_runs_follow_the_schema(kind: str) -> None:
    runs.validate(KINDS[kind]())


# fits


def test_a_power_law_is_found() -> None:
    sizes = [2.0, 8.0, 32.0, 100.0]
    law = fits.power_law(sizes, [3 * x**1.7 for x in sizes])
    assert law.exponent == pytest.approx(1.7) and law.factor == pytest.approx(3) and law.points == 4
    assert law.low == pytest.approx(1.7) and law.high == pytest.approx(1.7)
    assert law(50) == pytest.approx(3 * 50**1.7)


def test_the_interval_is_that_of_linear_regression() -> None:
    scipy_stats = pytest.importorskip("scipy.stats")
    x, y = [64, 128, 256, 512, 1024], [3.1, 4.0, 9.5, 30.0, 170.0]
    law = fits.power_law(x, y)
    expected = scipy_stats.linregress([math.log(v) for v in x], [math.log(v) for v in y])
    half = scipy_stats.t.ppf(0.975, 3) * expected.stderr
    assert law.exponent == pytest.approx(expected.slope)
    assert law.high - law.exponent == pytest.approx(half, rel=1e-3) == law.exponent - law.low
    assert list(fits.T_95) == pytest.approx([scipy_stats.t.ppf(0.975, df) for df in range(1, 21)], abs=6e-4)


PIXELS = [float(4**k) for k in range(6, 13)]  # 64² to 4096²


def test_a_power_law_is_fitted_to_all_sizes_that_follow_it() -> None:
    noise = [1.01, 1.01, 0.98, 1.0, 1.02, 0.99, 1.0]
    law = fits.largest_sizes(PIXELS, [2e-9 * x**1.5 * factor for x, factor in zip(PIXELS, noise, strict=True)])
    assert law is not None and law.points == len(PIXELS) and law.low < 1.5 < law.high
    exact = fits.largest_sizes(PIXELS, [2e-9 * x**1.5 for x in PIXELS])
    assert exact is not None and exact.exponent == pytest.approx(1.5)
    assert fits.largest_sizes(PIXELS[:2], [1, 2]) is None


def linear(fixed: float) -> plots.Curve:
    """Cost of the form a + b·N; fixed: a, as a share of b times the largest N."""
    points = [(x**0.5, fixed * PIXELS[-1] + x) for x in PIXELS]
    return plots.Curve("ours", "GPU time", points, [], (), fits.largest_sizes(PIXELS, [y for _, y in points]))


@pytest.mark.parametrize("fixed", [0.001, 0.003, 0.005])
def test_sizes_that_fixed_costs_rule_are_not_fitted(fixed: float) -> None:
    curve = linear(fixed)
    every = fits.power_law(PIXELS, [y for _, y in curve.measured])
    assert curve.determined and curve.law and curve.law.points == 4 and curve.fitted == "from 512² to 4096²"
    assert every.high < 1 < curve.law.high and curve.law.exponent == pytest.approx(1, abs=0.07)


@pytest.mark.parametrize("fixed", [0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 100.0])
def test_fixed_costs_leave_the_exponent_undetermined(fixed: float) -> None:
    """Flat sizes, however many, make a narrow interval, yet of what is no growth."""
    curve = linear(fixed)
    assert not curve.determined and "exponent" not in curve.legend


@pytest.mark.parametrize(
    ("x", "y"), [([1, 2], [1, 2]), ([1, 2, 3], [1, 2]), ([1, 2, 3], [1, 0, 2]), ([2, 2, 2], [1, 2, 3])]
)
def test_a_power_law_needs_points(x: list[float], y: list[float]) -> None:
    with pytest.raises(ValueError, match="a power law"):
        fits.power_law(x, y)


# rows


def test_gpu_time_counts_where_all_have_it() -> None:
    both, wall = row("a 1", "ours", 10, 20), row("a 1", "eager", None, 30)
    lost = row("a 1", "quack", None, None, status="unavailable", reason="no")
    assert rows.judged_by([both, lost]) == "gpu_us" and rows.judged_by([both, wall]) == "wall_us"
    assert rows.judged_by([lost]) == "wall_us" and rows.best([lost], "wall_us") is None
    assert rows.best([both, wall, lost], "wall_us") is both
    assert rows.contestants([wall, lost, both]) == ["ours", "eager", "quack"]
    assert rows.ratio_to_floor(both, "gpu_us", "p80") == pytest.approx(0.101)
    assert (
        rows.ratio_to_floor(lost, "gpu_us") is None and rows.ratio_to_floor(both | {"floor_us": None}, "gpu_us") is None
    )


# plots


def model_rows(run: dict[str, Any], direction: str = "forward") -> list[rows.Row]:
    own = [found for found in run["rows"] if found["family"] == "model" and found["pass"] == direction]
    return [found for found in own if not found["settings"]["largest"]]


def test_what_was_not_measured_is_extrapolated_by_flops() -> None:
    own = model_rows(made_up_runs.scaling())
    dit = plots.curve("DiT-B/4", own, "gpu_us")
    at = {found["settings"]["size"]: found for found in own if found["contestant"] == "DiT-B/4"}
    assert [size for size, _ in dit.measured] == [64, 128, 256, 512, 1024]
    assert [size for size, _ in dit.extrapolated] == [2048, 4096]
    seconds = at[1024]["gpu_us"]["median"] / 1e6
    assert dit.extrapolated[1][1] == pytest.approx(seconds * at[4096]["flops"] / at[1024]["flops"])
    assert dit.at(1024) == (pytest.approx(seconds), False) and dit.at(2048) == (dit.extrapolated[0][1], True)
    assert dit.at(3000) is None and dit.full == (4096,)
    law = fits.power_law([x**2 for x, _ in dit.measured[-4:]], [y for _, y in dit.measured[-4:]])
    assert dit.law == law and dit.legend == "DiT-B/4"  # five points of a curve that bends determine no exponent
    hdit = plots.curve("HDiT-B/4", own, "gpu_us")
    assert len(hdit.measured) == 7 and not hdit.extrapolated and not hdit.full
    flops = plots.curve("DiT-B/4", own, "flops")
    assert flops.legend == f"DiT-B/4: exponent {flops.law}" and str(flops.law).startswith("1.94 [1.8")
    assert len(flops.measured) == 7 and not flops.extrapolated  # counted, so known at every size
    assert not plots.curve("DiT-B/4", own, "peak_bytes").extrapolated


def test_an_axis_of_less_than_two_decades_has_round_numbers_and_room_for_the_legend() -> None:
    run = made_up_runs.scaling()
    run["rows"] = [found for found in model_rows(run) if found["settings"]["size"] <= 1024]
    memory = plots.pictures(run)["scaling"]().axes[-1]
    assert [text.get_text() for text in memory.get_yticklabels()] == ["0.7", "1", "1.5"]
    assert plots._round_numbers(3, 40) == [5, 10, 20]
    assert max(max(line.get_ydata()) for line in memory.get_lines()) < memory.get_ylim()[1] / 1.2


def test_full_attention_is_under_no_roof_of_neighborhood_attention() -> None:
    run = made_up_runs.kernels()
    before = len(plots._on_roofline(run))
    for found in run["rows"]:
        if found["contestant"] == "sdpa":
            found.update(status="ok", reason=None, gpu_us=stats(20), wall_us=stats(50))
    assert len(plots._on_roofline(run)) == before > 0


def test_one_point_is_not_extrapolated() -> None:
    own = [found for found in model_rows(made_up_runs.scaling()) if found["settings"]["size"] in (1024, 2048)]
    dit = plots.curve("DiT-B/4", own, "gpu_us")
    assert len(dit.measured) == 1 and not dit.extrapolated and dit.law is None and dit.legend == "DiT-B/4"


def lines(axes: Any) -> dict[str, Any]:
    return {line.get_label(): line for line in axes.get_lines()}


def test_the_scaling_picture_never_draws_a_guess_as_measured() -> None:
    run = made_up_runs.scaling()
    gap = next(found for found in model_rows(run) if found["settings"]["size"] == 256 and "HDiT" in found["contestant"])
    gap.update(status="not measured", reason="no time", gpu_us=None, wall_us=None)
    figure = plots.pictures(run)["scaling"]()
    cost, forward, step, memory = figure.axes
    assert cost.get_title() == "FLOPs of a forward pass (counted)" and cost.get_yscale() == cost.get_xscale() == "log"
    assert [axes.get_title() for axes in (forward, step)] == ["GPU time, forward pass", "GPU time, training step"]
    assert memory.get_title() == "Peak memory, training step" and memory.get_ylabel() == "GiB"
    hdit, dit, guess = forward.get_lines()
    costs = plots.curve("DiT-B/4", model_rows(run), "gpu_us")
    assert list(dit.get_ydata())[:5] == [y for _, y in costs.measured] and all(map(math.isnan, dit.get_ydata()[5:]))
    assert math.isnan(hdit.get_ydata()[2]) and not any(map(math.isnan, [*hdit.get_ydata()[:2], *hdit.get_ydata()[3:]]))
    assert guess.get_label() == "DiT-B/4: extrapolated, not measured"
    assert guess.get_linestyle() == "--" and guess.get_markerfacecolor() == "white"
    assert list(guess.get_ydata()) == [costs.measured[-1][1], *(y for _, y in costs.extrapolated)]
    assert {line.get_linestyle() for line in (hdit, dit)} == {"-"}
    texts = [text.get_text() for text in forward.texts]
    assert "out of memory" in texts and any(text.endswith("of DiT-B/4's\nGPU time at 1024²") for text in texts)
    assert not any("extrapolated" in label for label in lines(cost))
    for axes in figure.axes:
        (note,) = (text for text in axes.texts if "at 1024²" in text.get_text())
        assert note.xy[1] == min(line.get_ydata()[4] for line in axes.get_lines()[:2]) and note.get_va() == "top"


def test_a_guessed_ratio_says_so() -> None:
    run = made_up_runs.scaling()
    for found in run["rows"]:
        if found["contestant"] == "DiT-B/4" and found["settings"]["size"] >= 1024:
            found.update(status="out of memory", reason="full", gpu_us=None, wall_us=None)
    forward = plots.pictures(run)["scaling"]().axes[1]
    assert any("1024² (extrapolated)" in text.get_text() for text in forward.texts)
    claim = report.claim(model_rows(run))
    assert "of the FLOPs (counted)" in claim and "of the GPU time (extrapolated)" in claim


def test_no_share_is_told_of_times_that_may_be_equal() -> None:
    column = report._time_column("gpu_us")
    rows = [
        made_up_runs.row("image 64x64", name, stats(time, 0.05), None)
        for name, time in (("a", 100), ("b", 104), ("c", 200))
    ]
    assert report._share(column, rows[0], rows[2]) == "50%"
    assert report._share(column, rows[0], rows[1]) == "same within noise"
    assert report._share(column, rows[0], None) == ""
    rows[2]["gpu_us"]["repeats"] = 1
    assert report._share(column, rows[0], rows[2]) == "too few samples"


def judged(time: Any) -> dict[str, Any]:
    """A scaling run in which both models take the given GPU time at 1024², DiT half as much again as wall time."""
    run = made_up_runs.scaling()
    for found in run["rows"]:
        if found["family"] == "model" and found["settings"]["size"] == 1024:
            own = found["contestant"] == "HDiT-B/4"
            found |= {"gpu_us": stats(1000) if own else time, "wall_us": stats(2000 if own else 4000)}
    return run


@pytest.mark.parametrize(
    ("time", "word"),
    [(stats(1020), "same within noise"), (stats(9000) | {"repeats": 1}, "too few samples")],
)
def test_no_ratio_of_models_is_told_where_times_may_be_equal(time: rows.Stats, word: str) -> None:
    run = judged(time)
    claim = report.claim(model_rows(run))
    assert "(counted) and 50% of the wall time (measured) that DiT-B/4 takes" in claim
    assert claim.endswith(f"; GPU time: {word}.") and "of the GPU time" not in claim
    cost, forward, step, memory = plots.pictures(run)["scaling"]().axes
    for axes in (forward, step):
        assert [t.get_text() for t in axes.texts if "1024²" in t.get_text()] == [f"GPU time at 1024²:\n{word}"]
    assert any("of DiT-B/4's\nFLOPs at 1024²" in text.get_text() for text in cost.texts)
    assert any("of DiT-B/4's\npeak memory at 1024²" in text.get_text() for text in memory.texts)


def test_no_ratio_of_kernels_is_told_where_times_may_be_equal() -> None:
    found = [row("geglu 1", "ours", 100, 120), row("geglu 1", "liger", 102, 130), row("geglu 1", "eager", 300, 330)]
    found += [row("geglu 2", "ours", stats(100) | {"repeats": 1}, 120), row("geglu 2", "liger", 700, 800)]
    found = made_up_runs.run("kernels", found)["rows"]
    _, table = report._others(found)
    assert "| 1 | forward | 3.00x | same within noise |" in table and "| 2 | forward |  | too few samples |" in table
    assert "| too few samples |" in report._kernel_table(found) and "7.00x" not in report._kernel_table(found)
    path, run = Path("kernels.json"), made_up_runs.run("kernels", found)
    records = report.Records({path: run}, Path(), Path("page.md"), Path())
    line = "| `geglu` | forward | 2 | 1.00 | 1 same within noise, 1 too few samples |"
    assert line in report._kernels_summary(records)
    run["rows"][0]["gpu_us"] = stats(50)
    line = "| `geglu` | forward | 2 | 0.50 to 1.00 | 2.04x as fast, 1 too few samples |"
    assert line in report._kernels_summary(records)


def test_shares_keep_their_digits() -> None:
    assert [plots.share(ratio) for ratio in (2.31, 0.1, 0.0188, 0.00056, 0.0000351)] == [
        *("231%", "10%", "1.88%", "0.056%", "0.0035%"),
    ]


def test_draws_without_any_time() -> None:
    run = made_up_runs.scaling()
    run["rows"] = [
        found | {"status": "not measured", "reason": "no time", "gpu_us": None, "wall_us": None, "peak_bytes": None}
        for found in model_rows(run)
    ]
    assert list(plots.pictures(run)) == ["scaling"]
    assert [axes.get_title() for axes in plots.pictures(run)["scaling"]().axes] == ["FLOPs of a forward pass (counted)"]
    assert report.scaling_table(run)[-1][4:6] == ["not measured", "not measured"]


def test_bars_are_ratios_to_the_floor() -> None:
    run = made_up_runs.kernels()
    forward, both = plots.pictures(run)["na2d"]().axes
    assert (forward.get_title(), both.get_title()) == ("forward", "forward+backward")
    bars = [(bar.get_x(), bar.get_x() + bar.get_width()) for bar in forward.patches]
    assert len(bars) == 10 and {left for left, _ in bars} == {1}
    assert sorted(right for _, right in bars)[:2] == pytest.approx([1.3, 1.3])
    whiskers = [path.vertices[:, 0] for found in forward.collections for path in found.get_paths()]
    assert any(list(ends) == pytest.approx([1.3 * 0.99, 1.3 * 1.01]) for ends in whiskers)
    assert sum("sdpa: failed" in text.get_text() for text in forward.texts) == 2
    assert "GPU time / floor" == forward.get_xlabel()
    assert "quack" not in [text.get_text() for text in plots.pictures(run)["rms-norm"]().legends[0].get_texts()]


def test_many_cases_and_passes_make_a_picture_of_the_first() -> None:
    directions = ("forward", "backward", "forward+backward")
    found = [row(f"geglu {i}", "ours", 120, 130, **{"pass": name}) for i in range(14) for name in directions]
    figure = plots.pictures(made_up_runs.run("kernels", found))["geglu"]()
    assert [axes.get_title() for axes in figure.axes] == ["forward", "backward"]
    assert len(figure.axes[0].patches) == plots.MOST_CASES and "(10 of 14 cases)" in figure.get_suptitle()


def add(run: dict[str, Any], found: rows.Row) -> None:
    run["rows"] += made_up_runs.run("kernels", [found])["rows"]


def test_roofline_points_and_roofs() -> None:
    run = made_up_runs.kernels()
    work = {"flops": 10**9, "bytes": 10**7, "settings": {"dtype": "float32"}, "family": "tokens"}
    add(run, row("token_merge 1 float32", "ours", 100, 120, **work))
    ceilings = run["sessions"][0]["ceilings"]
    ceilings["matmul_fp32_tflop_s"] = 50.0
    (axes,) = plots.pictures(run)["roofline"]().axes
    points = {tuple(map(float, p)) for found in axes.collections for p in found.get_offsets()}
    assert any(p == pytest.approx((100, 1e13)) for p in points)
    expected = {(24.5, 24.5 * made_up_runs.COPY * 1e12 / ratio) for ratio in (1.3, 6.1, 5.2, 12.5, 41.0)}
    assert all(any(p == pytest.approx(e, rel=1e-3) for p in points) for e in expected)
    assert {round(max(line.get_ydata()) / 1e12) for line in axes.get_lines()} == {750, 50}
    del ceilings["matmul_bf16_tflop_s"], ceilings["matmul_fp32_tflop_s"]
    assert "roofline" not in plots.pictures(run)


def test_the_roofline_shows_its_slope_where_all_intensities_are_high() -> None:
    run = made_up_runs.kernels()
    run["sessions"][0]["ceilings"] = {
        "copy_tb_s": 1e-2,
        "matmul_bf16_tflop_s": 1e-2,
        "matmul_fp32_tflop_s": 1e-1,
    }  # a processor's
    (axes,) = plots.pictures(run)["roofline"]().axes
    knees = [line.get_xdata()[1] for line in axes.get_lines()]
    assert knees and all(axes.get_xlim()[0] < knee < axes.get_xlim()[1] for knee in knees)


def test_no_ceiling_s_label_covers_a_point() -> None:
    run = made_up_runs.kernels()
    run["sessions"][0]["ceilings"]["matmul_fp32_tflop_s"] = 50.0
    work = {"bytes": 10**7, "settings": {"dtype": "float32"}, "family": "tokens"}
    for case in range(40):  # all along the roofs, up to the last intensity
        flops = int(10 ** (6 + case / 10))
        fastest = max(flops / 50e6, 10**7 / (made_up_runs.COPY * 1e6))
        add(run, row(f"token_merge {case}", "ours", fastest, fastest, flops=flops, **work))
    figure = plots.pictures(run)["roofline"]()
    figure.draw_without_rendering()
    (axes,) = figure.axes
    boxes = [text.get_window_extent() for text in axes.texts]
    points = [axes.transData.transform(p) for found in axes.collections for p in found.get_offsets()]
    assert len(boxes) == 3 and len(points) > 40
    assert not any(box.padded(3).contains(*point) for box in boxes for point in points)
    assert all(figure.bbox.containsx(x) and figure.bbox.containsy(y) for box in boxes for x, y in box.get_points())


def test_contestants_look_different_and_colour_blind_safe() -> None:
    okabe_ito = "#000000 #E69F00 #56B4E9 #009E73 #F0E442 #0072B2 #D55E00 #CC79A7".split()
    names = ["ours", "natten hopper-fna", "natten cutlass-fna", "flex", "sdpa", "liger", "quack", "compiled", "eager"]
    looks = [plots.look(name) for name in names]
    assert len({color for color, _ in looks}) == len({mark for _, mark in looks}) == len(names)
    assert {color for color, _ in looks} <= {*okabe_ito, plots.GREY}
    assert plots.look("HDiT-B/4") == plots.look("ours") and plots.look("HDiT-B/4") != plots.look("DiT-B/4")


# The page of a folder


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Path]]:
    folder = tmp_path_factory.mktemp("runs")
    for kind, make in KINDS.items():
        results.write(folder / f"{kind}.json", make())
    results.write(folder / "notes.json", {"no": "run"})
    output = folder / "new" / "page"
    return output, report.write_page(folder, output)


def test_every_picture_is_written_and_shows_something(page: tuple[Path, list[Path]]) -> None:
    output, written = page
    names = [
        "kernels-na2d",
        "kernels-rms-norm",
        "kernels-roofline",
        "scaling-scaling",
        "scaling-time",
        "scaling-attention",
    ]
    assert sorted(p.name for p in written) == sorted(
        ["report.md", *(f"{n}.{s}" for n in names for s in ("png", "svg"))]
    )
    assert sorted(output.iterdir()) == sorted(written)
    for name in names:
        kind, _, short = name.partition("-")
        digest = plots.digest(runs.read(output.parent.parent / f"{kind}.json"), short)
        with Image.open(output / f"{name}.png") as image:
            assert image.text["Description"] == digest and min(image.size) > 250
            colors = image.convert("RGB").getcolors(maxcolors=10**6)
            assert len(colors) > 20 and max(count for count, _ in colors) < 0.97 * image.width * image.height
        svg = (output / f"{name}.svg").read_text()
        assert digest in svg and svg.count("<path") > 10 and "<dc:date>" not in svg
    assert "(arXiv 2401.11605):" in (output / "scaling-scaling.svg").read_text()  # what is written is not rounded


def test_the_page_shows_the_clocks_of_before_and_after(tmp_path: Path) -> None:
    run = made_up_runs.kernels()
    (session,) = run["sessions"]
    session["clocks"] |= {"sm_mhz_end": 1755, "memory_mhz_end": 3201}
    runs.validate(run)
    assert "| SM 1980 MHz, memory 3201 MHz; after it SM 1755 MHz, memory 3201 MHz |" in machines(run, tmp_path)
    session["clocks"] = dict.fromkeys(session["clocks"])
    assert "TFLOP/s |  |" in machines(run, tmp_path)


def test_the_sessions_of_a_run_are_one_line(tmp_path: Path) -> None:
    run = made_up_runs.kernels()
    clocks, ceilings = {"sm_mhz": 1530, "memory_mhz": 3201}, {"copy_tb_s": 4.001, "matmul_bf16_tflop_s": 738.4}
    (first,) = run["sessions"]
    later = first | {"commit": "1" * 40, "date": "2026-11-24", "clocks": clocks, "ceilings": ceilings}
    run["sessions"] += [later, later | {"clocks": {}, "ceilings": {}}]
    for session, found in enumerate(run["rows"][:3]):
        found["session"] = session
    _, _, line = machines(run, tmp_path).splitlines()
    assert "| copy 4.00 TB/s, bf16 738–750 TFLOP/s | SM 1530–1980 MHz, memory 3201 MHz |" in line
    assert f"| 2026-11-24, commit {'0' * 12}, {'1' * 12} |" in line


def test_machines_tell_of_several_cards(tmp_path: Path) -> None:
    for card, said in (("one", False), ("two", True)):
        run = made_up_runs.kernels()
        run["sessions"] += [session | {"gpu_uuid": card} for session in run["sessions"]]
        run["rows"][0]["session"] = 1
        assert ("(2 cards)" in machines(run, tmp_path)) == said


def machines(run: dict[str, Any], folder: Path) -> str:
    results.write(folder / "run.json", run)
    return report.BLOCKS["machines"](report.load(folder, folder, folder / "report.md"))


def test_the_page_has_every_part(page: tuple[Path, list[Path]]) -> None:
    output, _ = page
    text = (output / "report.md").read_text()
    assert re.findall(r"^## (.*)$", text, re.MULTILINE) == [
        *("Machines", "Scaling with the size of the image", "Attention alone"),
        *("Kernels", "Models", "Training", "Every measurement"),
    ]
    assert "| clocks before timing |" in text and "| SM 1980 MHz, memory 3201 MHz |" in text
    for link in re.findall(r"\]\(([^)]+)\)", text):
        assert (output / link).exists(), link
    assert "| 1024² | 1,446 | 169,263 | 0.85% | 5.72 ms | 565 ms | 1.01% |" in text
    assert "| 1024² | 130.0M | 130.0M | 1.44 GiB | 1.44 GiB | 100% |" in text
    claim = "0.85% of the FLOPs (counted), 1.01% of the GPU time (measured) and 1.45% of the wall time (measured)"
    assert f"At 1024² HDiT-B/4 takes {claim} that DiT-B/4 takes." in text
    step = "| 4096² | 228 ms | out of memory |  | 230 ms | out of memory |  | 42.75 GiB | out of memory |  |"
    assert step in text  # GPU time flatters small images: wall time stands beside it
    assert "- DiT-B/4: out of memory (" in text
    assert "| 1024² | HDiT-B/4 | step | 8 | 63.8 | 111.76 GiB | limited by memory |" in text
    assert re.search(
        r"\| GPU time, training step \| 0\.\d\d \[[\d., ]+\] from 512² to 4096²; 0\.\d\d from 2048² to 4096² \| "
        r"not determined \[[\d., ]+\] from 128² to 1024²; 1\.\d\d from 512² to 1024² \|",
        text,
    )
    assert "| 512² | 89.1 µs | 134 µs | 1.33 ms | 690 µs | 75.6 ms |" in text
    ours = "| 4x256x256x2x64 k7 bfloat16 | forward | 67.0 µs | 87.1 µs | 1.30 | 127 µs |"
    assert f"{ours} natten cutlass-fna | 348 µs | 388 µs | 4.00x faster |" in text
    assert "- natten cutlass-fna: tile (8, 8).\n- natten hopper-fna: tile (8, 8).\n- sdpa: failed" in text
    assert "| 131072x128 bfloat16 | forward | 25.0 µs | 26.5 µs | 1.06 |" in text and "| same within noise |" in text
    assert "- sdpa: failed (query.grad: error 3.1e-01, allowed 4.1e-03): 4 measurements." in text
    assert "- quack: unavailable (quack is not installed: pip install quack-kernels): rms_norm 131072x128" in text
    assert "| flowers-256 batch 32 | forward | k-diffusion | 10.6 ms | 30.0 ms | 521 | 5.00 GiB |" in text
    assert "2.64x faster (GPU time), 7.14x faster (wall time) |" in text
    assert "SM 1980 MHz, memory 3201 MHz" in text and "copy 4.00 TB/s, bf16 750 TFLOP/s" in text
    assert "87.1 µs [86.2 µs, 88.0 µs]" in text


def test_what_a_user_waits_for_graphs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A column where a run has such times; rows without one show a dash, and below the table is why."""
    folder = tmp_path / "runs"
    for kind in ("scaling", "model", "train"):
        run = made_up_runs.captured(KINDS[kind]())
        runs.validate(run)
        results.write(folder / f"{kind}.json", run)
    monkeypatch.setattr(report, "save_pictures", lambda *_: [])
    report.write_page(folder, tmp_path)
    text = (tmp_path / "report.md").read_text()
    assert "| GPU time | wall time | captured | kernels |" in text
    assert "| flowers-256 batch 32 | forward | ours | 4.00 ms | 4.20 ms | 4.20 ms |" in text
    assert "| flowers-256 batch 32 | forward | k-diffusion | 10.6 ms | 30.0 ms | – | 521 |" in text
    assert "| flowers-256 batch 32 | forward+backward | ours | 12.0 ms | 12.6 ms | – |" in text
    assert "| forward | k-diffusion, compiled |  | out of memory | out of memory |" in text
    why = "- k-diffusion: not captured: an operation in it waits for the GPU"
    assert text.count(f"{why}: 2 measurements.") == 2  # of forward passes, and of steps
    assert "| share | HDiT-B/4 captured | DiT-B/4 captured | share |" in text
    assert "| 1024² | 1,446 | 169,263 | 0.85% | 5.72 ms | 565 ms | 1.01% | 8.22 ms | 568 ms | 1.45% | 5.92 ms |" in text
    step = "| 4096² | 228 ms | out of memory |  | 230 ms | out of memory |  | 228 ms | out of memory |  | 42.75 GiB |"
    assert step in text
    claim = "1.45% of the wall time (measured) and 1.05% of the wall time where both are captured (measured)"
    assert f"{claim} that DiT-B/4 takes." in text
    assert "| images/s (wall) | images/s (captured) |" in text and "| step | 8 | 63.8 | 65.0 | 111.76 GiB |" in text
    assert "87.1 µs [86.2 µs, 88.0 µs]" not in text and "4.20 ms [4.16 ms, 4.24 ms]" in text
    api.print_table(made_up_runs.captured(made_up_runs.models()))
    assert re.search(r" wall +┃ captured ", capsys.readouterr().out)


def test_a_peer_is_judged_by_graphs_too(tmp_path: Path) -> None:
    run = made_up_runs.models("train")
    for found in run["rows"]:
        if found["status"] == "ok":
            found["captured_us"] = stats(found["gpu_us"]["median"] + 200)
    results.write(tmp_path / "train.json", run)
    records = report.load(tmp_path, tmp_path, tmp_path / "page.md")
    text = report.BLOCKS["training"](records)
    assert "2.64x faster (GPU time), 7.14x faster (wall time), 2.62x faster (captured) |" in text
    for found in run["rows"]:
        if found["contestant"] == "k-diffusion":
            found["captured_us"] = stats(12_300, 0.05)
    results.write(tmp_path / "train.json", run)
    records = report.load(tmp_path, tmp_path, tmp_path / "page.md")
    assert "same within noise (captured) |" in report.BLOCKS["training"](records)


def test_largest_batches_are_sorted_and_said_to_be_powers_of_two() -> None:
    found = [
        row("a", name, 100, 110, **{"pass": direction}, settings={"size": size, "batch": 4, "largest": True})
        for direction in ("step", "forward")
        for size in (128, 64)
        for name in ("DiT", "HDiT")
    ]
    ((title, (_, *body)),) = report.largest_table(found).items()
    assert title == "The largest batch that fits, of powers of two"
    models = [(name, direction) for name in ("HDiT", "DiT") for direction in ("forward", "step")]
    assert [tuple(line[:3]) for line in body] == [(size, *model) for size in ("64²", "128²") for model in models]


def test_the_summary_spans_the_cases(clone: Path) -> None:
    run = made_up_runs.kernels()
    next(found for found in run["rows"] if found["contestant"] == "natten cutlass-fna")["gpu_us"] = stats(174.2)
    next(found for found in run["rows"] if found["contestant"] == "ours")["gpu_us"] = stats(201)
    full = next(found for found in run["rows"] if found["contestant"] == "sdpa")
    full.update(status="ok", reason=None, gpu_us=stats(20), wall_us=stats(50))  # no rival: another model
    put(clone, "kernels.json", run)
    found = report.render(block("kernels-summary"), report.recorded(clone / "README.md", clone))
    assert "| `na2d` | forward | 2 | 1.30 to 3.00 | 0.87x to 4.00x as fast |" in found


def test_the_front_shows_one_number_and_rows_that_lose_too(clone: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loses = row("geglu 32768x2x768 bfloat16", "ours", 100, 120, **{"pass": "forward+backward"})
    rival = loses | {"contestant": "liger", "gpu_us": stats(80)}
    put(clone, "kernels.json", made_up_runs.run("kernels", [*made_up_runs.kernels()["rows"], loses, rival]))
    put(clone, "scaling.json", made_up_runs.scaling())
    names = ("front-sentence", "front-table", "front-picture")
    found = report.render("".join(map(block, names)), report.recorded(clone / "README.md", clone))
    assert "for 4 grids of 256x256 tokens with 2 heads of 64 and windows of 7x7: **4.0 times as fast as" in found
    assert "the fastest other** (natten cutlass-fna," in found and "Made-up GPU, in bfloat16" in found
    body = re.findall(r"^\| `.*", found, re.MULTILINE)
    assert [line.split(" | ")[-1] for line in body] == ["4.00x |", "4.00x |", "0.80x |"] and len(report.FRONT) <= 10
    assert "(docs/pictures/scaling-time.svg)" in found


def test_the_front_picture_shows_what_was_measured_only() -> None:
    (axes,) = plots.pictures(made_up_runs.scaling())["time"]().axes
    assert all(line.get_linestyle() == "-" for line in axes.get_lines())
    assert {len(line.get_xdata()) for line in axes.get_lines()} == {7}  # DiT-B/4: NaN where it was not measured
    assert axes.get_legend_handles_labels()[1] == ["HDiT-B/4", "DiT-B/4"]


def test_a_run_s_part_of_a_block_starts_with_its_device(clone: Path) -> None:
    for device in ("GPU 1", "GPU 2"):
        for kind, make in KINDS.items():
            made = make()
            made["environment"] = made["environment"] | {"device": device}
            put(clone, f"{kind}{device[-1]}.json", made)
    records = report.recorded(clone / "docs" / "page.md", clone)
    for name in ("scaling-details", "attention", "kernels", "models", "training"):
        text = report.BLOCKS[name](records)
        assert re.findall(r"^\*\*(.*)\*\*$", text, re.MULTILINE) == ["GPU 1", "GPU 2"] and text.startswith("**GPU 1**")
    headings = re.findall(r"^### (.*)$", report.BLOCKS["kernels"](records), re.MULTILINE)
    assert headings == [f"`{operator}`, {device}" for device in ("GPU 1", "GPU 2") for operator in ("na2d", "rms_norm")]


def test_the_floor_shown_is_that_of_our_own_session(clone: Path) -> None:
    run = made_up_runs.kernels()
    ours = next(found for found in run["rows"] if found["contestant"] == "ours")
    ours["floor_us"] = 77.0
    run["rows"].sort(key=lambda found: found["contestant"] == "ours")  # ours last
    put(clone, "kernels.json", run)
    text = report.render(block("kernels"), report.recorded(clone / "README.md", clone))
    line = next(line for line in text.splitlines() if "| forward | 77.0 µs |" in line)
    assert f"| {ours['gpu_us']['median'] / 77:.2f} |" in line


def test_the_summary_takes_each_operator_from_the_newest_run_that_timed_it(clone: Path) -> None:
    old, new = made_up_runs.kernels(), made_up_runs.kernels()
    new["environment"]["device"] = "a newer GPU"
    new["sessions"][0]["date"] = "2099-01-01"
    for found in new["rows"]:
        if found["operator"] != "na2d":
            found.update(status="not measured", reason="the budget is spent", gpu_us=None, wall_us=None)
    put(clone, "old.json", old)
    put(clone, "new.json", new)
    text = report.render(block("kernels-summary"), report.recorded(clone / "README.md", clone))
    assert "| `na2d` | forward | a newer GPU |" in text
    assert f"| `rms_norm` | forward | {old['environment']['device']} |" in text
    assert "results/new.json" in text and "results/old.json" in text


def test_every_other_contestant_is_a_multiple_of_ours() -> None:
    found = [row("na2d 1", "ours", 100, 110), row("na2d 1", "flex", 250, 300), row("na2d 1", "natten", 400, 500)]
    heading, table = report._others(found)
    assert heading == "GPU time of the others, as a multiple of ours:"
    assert "| case | pass | flex | natten |" in table and "| 2.50x | 4.00x |" in table
    assert report._others(found[:2]) == []  # in the table of kernels already


def test_each_table_says_at_which_commit_it_was_measured(clone: Path) -> None:
    run = made_up_runs.kernels()
    run["sessions"] += [session | {"commit": "1" * 40, "date": "2026-12-01"} for session in run["sessions"]]
    for found in run["rows"]:
        found["session"] = int(found["operator"] == "rms_norm")
    put(clone, "kernels.json", run)
    text = report.render(block("kernels"), report.recorded(clone / "README.md", clone))
    na2d, rms_norm = text.split("### ")[1:]
    assert f"\nMeasured: 2026-11-23, commit {'0' * 12}.\n" in na2d
    assert f"\nMeasured: 2026-12-01, commit {'1' * 12}.\n" in rms_norm
    assert f", 2026-12-01, commit {'0' * 12}, {'1' * 12}.\n" in rms_norm  # of all


def test_attention_that_was_not_timed_has_no_table(clone: Path) -> None:
    run = made_up_runs.scaling()
    for found in run["rows"]:
        if found["family"] == "attention" and found["pass"] == "forward":
            found.update(status="not measured", reason="the budget is spent", gpu_us=None, wall_us=None)
    put(clone, "scaling.json", run)
    text = report.render(block("attention"), report.recorded(clone / "README.md", clone))
    assert "| tokens |" not in text and "not measured (the budget is spent)" in text


def test_brackets_in_a_reason_are_printed_as_they_are(capsys: pytest.CaptureFixture[str]) -> None:
    """rich would take them for its markup."""
    run = made_up_runs.kernels()
    run["rows"][0] |= dict.fromkeys(("gpu_us", "wall_us", "host_us")) | {"status": "failed", "reason": "[/x.cu:1] [y]"}
    api.print_table(run)
    assert "[/x.cu:1] [y]" in "".join(capsys.readouterr().out.split("\n"))


def test_the_terminal_s_table_has_floors_and_memory(capsys: pytest.CaptureFixture[str]) -> None:
    api.print_table(made_up_runs.kernels())
    printed = capsys.readouterr().out
    assert "1.30 x 67.0 µs" in printed and "memory" not in printed
    assert re.search(r"wall .* bytes .* FLOPs .* error ", printed)
    api.print_table(made_up_runs.models())
    assert re.search(r"memory .* GiB ", capsys.readouterr().out, re.DOTALL)
    on_cpu = made_up_runs.kernels()
    on_cpu["environment"]["device_type"] = "cpu"
    api.print_table(on_cpu)
    assert re.search(r"pass .* wall .* p20 … p80 .* bytes ", capsys.readouterr().out)


def test_amounts() -> None:
    found = [api.amount(number, "B") for number in (None, 0, 12, 1234, 268_435_456, 6_576_668_672)]
    assert found == ["", "", "12.0 B", "1.23 kB", "268 MB", "6.58 GB"]


@pytest.mark.parametrize(
    ("details", "collapsed"),
    [
        (["plain PyTorch, fullgraph"], "plain PyTorch, fullgraph"),
        (["compiled; tile 8x8, 4 warps", "compiled; tile 4x16, 4 warps"], "compiled; tile 8x8 · 4x16, 4 warps"),
        (["sees all 64 keys; checked on a 1 k7", "sees all 64 keys; checked on a 2 k7"], None),
        (["tanh GELU", "tanh GELU; checked on a"], "tanh GELU; in some cases checked on a"),
        (["one", "one more", "other"], "one · one more · other"),
        (["a b", "a c b", "a b b"], "a b · c b · b b"),
    ],
)
def test_details_say_once_what_they_share(details: list[str], collapsed: str | None) -> None:
    assert report._collapsed(details) == (collapsed or "sees all 64 keys; checked on a 1 · 2 k7")


def test_a_slower_kernel_is_called_slower() -> None:
    found = [row("rms_norm 1", "ours", 150, 160), row("rms_norm 1", "liger", 100, 110)]
    assert "| 1.50x slower |" in report._kernel_table(found) and "another" not in report._kernel_table(found)
    found[1]["detail"] = "another function: tanh GELU"
    assert "| liger (another function) |" in report._kernel_table(found)
    legend = plots.pictures(made_up_runs.run("kernels", found))["rms-norm"]().legends[0]
    assert [text.get_text() for text in legend.get_texts()] == ["ours", "liger (another function)"]
    found[0] |= {"status": "failed", "reason": "wrong", "gpu_us": None, "wall_us": None}
    assert "| failed |" in report._kernel_table(found) and "slower" not in report._kernel_table(found)


def test_the_command_writes_a_page(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    results.write(tmp_path / "model.json", made_up_runs.models())
    assert main(["report", str(tmp_path)]) == 0
    assert capsys.readouterr().out == f"Written: {tmp_path / 'report.md'}\n"
    assert "## Models" in (tmp_path / "report.md").read_text()


def test_bad_input_is_one_line_and_status_2(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    empty, text, schema = (tmp_path / name for name in ("empty", "text", "schema"))
    for folder in (empty, text, schema):
        folder.mkdir()
    (text / "a.json").write_text("{")
    results.write(schema / "a.json", made_up_runs.models() | {"schema": 7})
    (tmp_path / "file").touch()
    good = tmp_path / "good"
    results.write(good / "a.json", made_up_runs.models())
    for arguments, words in [
        ((str(tmp_path / "absent"),), "absent: No such file or directory"),
        ((str(empty),), "holds no run"),
        ((str(text),), "a.json"),
        ((str(schema),), "schema 7"),
        ((str(good), "--output", str(tmp_path / "file")), "file"),
        (("--output", str(tmp_path)), "needs a FOLDER"),
        ((str(good), "--check"), "--check is of the clone's own documents, got the folder"),
    ]:
        assert main(["report", *arguments]) == 2, arguments
        out, err = capsys.readouterr()
        assert err.startswith("python -m benchmarks: ") and err.count("\n") == 1 and words in err, err
        assert not out


# Blocks of a clone's documents


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    (tmp_path / "benchmarks" / "results").mkdir(parents=True)
    (tmp_path / "docs").mkdir()
    (tmp_path / "README.md").write_text("Nothing generated\n")
    return tmp_path


def put(clone: Path, name: str, data: dict[str, Any]) -> None:
    results.write(clone / "benchmarks" / "results" / name, data)


def block(name: str) -> str:
    return f"<!-- generated: {name} -->\n<!-- end of {name} -->\n"


GPU_TESTS = {
    "session": 0,
    "operators": {
        "na2d": {
            "bfloat16": {"cases": 200, "worst_ratio": 0.512, "worst_tensor": "key.grad"},
            "float32": {"cases": 100, "worst_ratio": 0.25, "worst_tensor": "out"},
        },
        "geglu": {"bfloat16": {"cases": 200, "worst_ratio": 0.75, "worst_tensor": "out"}},
    },
    "tests": {"passed": 61, "failed": 2},
    "large_offsets": {
        "na2d": {"bfloat16": {"elements": 2**31 + 5, "worst_error": 0.00123}},
        "geglu": {"bfloat16": {"elements": 2**31 + 9, "worst_error": 0.0004}},
    },
    "deterministic": {"na2d": {"bfloat16": {"runs": 20}}},
    "sanitizer": {"memcheck": {"bfloat16": {"errors": 0, "operators": ["na2d", "geglu"]}}},
    "model_parity": {"A": {"float32": {"output": 1.23456e-6, "gradient": 2e-5}}},
}


def test_blocks_without_records(clone: Path) -> None:
    document = clone / "docs" / "page.md"
    text = f"Before\n{''.join(map(block, report.BLOCKS))}after\n".replace("-->\n<!-- end", "-->\nold\n<!-- end")
    found = report.render(text, report.recorded(document, clone))
    assert "old" not in found and found.startswith("Before\n") and found.endswith("after\n")
    assert found.count(report.NOTHING) == len(report.BLOCKS) - 1 and "No run on a GPU is recorded yet." in found


def test_blocks_of_records(clone: Path) -> None:
    whole = runs.merge(*(make() for make in KINDS.values())) | {"gpu_tests": GPU_TESTS}
    put(clone, "gpu.json", whole)
    document = clone / "docs" / "page.md"
    text = "".join(map(block, report.BLOCKS))
    found = report.render(text, report.recorded(document, clone))
    assert report.NOTHING not in found
    assert report.render(found, report.recorded(document, clone)) == found
    assert "500 random cases" in found and "on Made-up GPU" in found
    assert "| `geglu` | 0.75 (out) |  |" in found and "| `na2d` | 0.51 (key.grad) | 0.25 (out) |" in found
    for fact in [
        "- GPU tests: 61 passed, 2 failed.",
        "- Tensors of more than 2³¹ elements: worst relative error 0.0012 over 2 operators.",
        "- Operators bitwise equal over 20 runs, forward and backward: 1.",
        "- compute-sanitizer, memcheck: 0 errors over 2 operators.",
        "| A | float32 | 1.2e-06 | 2e-05 |",
    ]:
        assert f"{fact}\n" in found
    assert "[benchmarks/results/gpu.json](../benchmarks/results/gpu.json), Made-up GPU" in found
    assert f"driver 580.1, 2026-11-23, commit {'0' * 12}." in found
    assert "![Cost of HDiT-B/4 and DiT-B/4 as images grow, Made-up GPU](pictures/gpu-scaling.svg)" in found
    pictures = {name for name in plots.pictures(whole) if f"pictures/gpu-{name}.svg" in found}
    assert pictures == set(report.SHOWN) < set(plots.pictures(whole))
    assert "| `na2d` | forward | 2 | 1.30 | 4.00x as fast |" in found
    assert "| `rms_norm` | forward | 1 | 1.06 | 1 same within noise |" in found


def test_a_gpu_s_newest_run_comes_first(clone: Path) -> None:
    for name, device_type, date in [
        ("a", "cpu", "2027-01-01"),
        ("b", "cuda", "2026-06-01"),
        ("c", "cuda", "2026-06-02"),
        ("d", "cuda", "2026-06-02"),
    ]:
        made = made_up_runs.scaling(device=f"device {name}", device_type=device_type, date=date)
        put(clone, f"{name}.json", made)
    records = report.recorded(clone / "README.md", clone)
    assert "".join(path.stem for path in records.runs) == "cdba"
    readme = report.render(block("scaling"), records)
    assert "device c" in readme and not any(f"device {name}" in readme for name in "abd")
    details = report.render(block("scaling-details"), records)
    assert all(f"device {name}" in details for name in "abcd")


def test_a_changed_source_makes_rows_old_and_no_page(clone: Path) -> None:
    present, entry = sources.present(), "na2d"
    run = runs.merge(made_up_runs.kernels(), made_up_runs.models("train"))
    run["rows"] = [found for found in run["rows"] if found["operator"] != "na2d"]  # which has pictures
    run["gpu_tests"] = GPU_TESTS
    for session in run["sessions"]:
        session["sources"] = present | {entry: "a" * 16}
    put(clone, "gpu.json", run)
    for package in sources.OURS:
        shutil.copytree(results.ROOT / package, clone / package, dirs_exist_ok=True)
    (clone / "README.md").write_text("".join(map(block, report.BLOCKS)))
    report.write_documents(clone)
    at = f"2026-11-23, commit {'0' * 12}"
    tested = f"gpu.json, GPU tests, na2d: 1 rows are old: sources {'a' * 16} of {at}, now {present['na2d']}"
    assert report.differences(clone) == [] and report.old_rows(clone) == [tested]
    ema = clone / "hdit" / "ema.py"
    ema.write_text(ema.read_text().replace("def ema_update(", "def ema_update(a, "))
    sources.present.cache_clear()
    line, _ = report.old_rows(clone)
    then, now = present[sources.STEP], sources.present(clone)[sources.STEP]
    assert line == f"gpu.json, train, training step: 6 rows are old: sources {then} of {at}, now {now}"
    assert report.differences(clone) == []
    run["rows"][0]["gpu_us"]["median"] += 1000
    put(clone, "gpu.json", run)
    assert report.differences(clone) == ["README.md"]


@pytest.mark.parametrize("due", [False, True])
def test_check_tells_what_is_old_and_fails_where_a_page_is_due(
    due: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(report, "old_rows", lambda: [] if due else ["geglu is old"])
    monkeypatch.setattr(report, "differences", lambda: ["README.md"] if due else [])
    assert main(["report", "--check"]) == due
    printed = capsys.readouterr().out
    assert ("geglu is old" in printed) != due == ("README.md is not what the records make of it" in printed)


@pytest.mark.parametrize(
    "text",
    [
        "<!-- generated: scaling -->\n",
        "<!-- generated: scaling -->\n<!-- end of gpu-tests -->\n",
        "<!-- generated: unknown -->\n<!-- end of unknown -->\n",
    ],
)
def test_renders_no_broken_block(text: str, clone: Path) -> None:
    with pytest.raises(ValueError, match="scaling|unknown"):
        report.render(text, report.recorded(clone / "README.md", clone))


def test_what_only_the_site_shows(clone: Path) -> None:
    document = clone / "docs" / "page.md"
    text = "a\n\n<!-- built: machines -->\n\n<!-- built: gpu-tests -->\n" + block("scaling")
    assert report.render(text, report.recorded(document, clone)).startswith(text[:50])  # the file keeps the marks
    shown = f"a\n\n{report.NOTHING}\n\nNo run on a GPU is recorded yet.\n" + block("scaling")
    assert report.built(text, document, clone) == shown
    with pytest.raises(ValueError, match="page.md: no block is called 'unknown', only"):
        report.built("<!-- built: unknown -->", document, clone)


def test_writes_documents_and_pictures(clone: Path) -> None:
    run = made_up_runs.scaling()
    run["rows"] = model_rows(run)
    put(clone, "some.json", run)
    (clone / "docs" / "page.md").write_text(block("scaling-picture"))
    (clone / "docs" / "pictures").mkdir()
    (clone / "docs" / "pictures" / "gone-scaling.svg").touch()
    written = report.write_documents(clone)
    picture, front = (clone / "docs" / "pictures" / f"some-{name}.svg" for name in ("scaling", "time"))
    assert written == [clone / "docs" / "page.md", picture, front]
    assert sorted(picture.parent.iterdir()) == [picture, front] and report.differences(clone) == []
    assert "pictures/some-scaling.svg" in (clone / "docs" / "page.md").read_text()
    before = picture.read_bytes()
    assert report.write_documents(clone) == [picture, front]
    assert picture.read_bytes() == before  # the same data make the same file
    picture.write_text("another")
    (picture.parent / "gone.svg").touch()
    assert report.differences(clone) == ["docs/pictures/gone.svg", "docs/pictures/some-scaling.svg"]


def test_a_changed_measurement_changes_its_digest() -> None:
    run = made_up_runs.kernels()
    other = copy.deepcopy(run)
    other["rows"][0]["gpu_us"] = stats(1)
    assert plots.digest(run, "na2d") == plots.digest(copy.deepcopy(run), "na2d") != plots.digest(other, "na2d")
    assert plots.digest(run, "scaling") == plots.digest(other, "scaling")


def test_whose_attention_is_told() -> None:
    rows = [
        {"contestant": "DiT", "detail": "checked at 128²; SDPA by cuDNN"},
        {"contestant": "DiT", "detail": "SDPA by cuDNN"},
        {"contestant": "HDiT", "detail": "SDPA by FlashAttention"},
        {"contestant": "HDiT", "detail": "SDPA by cuDNN"},
        {"contestant": "other", "detail": None},
    ]
    line = "torch's scaled_dot_product_attention is done in DiT by cuDNN, in HDiT by FlashAttention and cuDNN."
    assert report.sdpa_line(rows) == line
    assert report.sdpa_line(rows[-1:]) == ""
