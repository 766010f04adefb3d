"""Charts as numbers, and which columns share one."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from helios_train.evaluation import curves
from helios_train.evaluation.charts import BOTTOM, LEFT, LINES, RIGHT, TOP, Chart, Line, draw, short
from helios_train.evaluation.recorded import Alarm, Record
from helios_train.evaluation.thinning import Series, Thinned


def line(*y: float, label: str = "loss", noisy: bool = False) -> Line:
    return Line(label, np.arange(len(y), dtype=float), np.array(y), noisy=noisy)


def series(*y: float) -> Series:
    column = Thinned()
    column.add(np.arange(len(y), dtype=float), np.array(y))
    found = column.series()
    assert found is not None
    return found


def places(path: str) -> np.ndarray:
    """[P, 2] of a path's points."""
    return np.array([point.split(",") for point in path.lstrip("M").rstrip("Z").split("L")], dtype=float)


def test_a_line_goes_through_its_points() -> None:
    drawn = draw(Chart("loss", [line(0.0, 10.0, 5.0)]))
    (x0, y0), (x1, y1), (x2, y2) = places(drawn.lines[0]["path"])
    assert (x0, x2) == (LEFT, RIGHT) and x1 == pytest.approx((LEFT + RIGHT) / 2, abs=0.1)
    assert y0 == BOTTOM and TOP < y1 < y2 == pytest.approx((y0 + y1) / 2, abs=0.1)
    assert [label for _, label in drawn.y_ticks] == ["0", "5", "10"]
    assert drawn.y_ticks[0][0] == BOTTOM and drawn.y_ticks[-1][0] == pytest.approx(y1, abs=0.1)
    assert [label for _, label in drawn.x_ticks] == ["0", "1", "2"]
    assert drawn.lines[0]["last"] == "5" and len(drawn.lines[0]["dots"]) == 3


def test_far_apart_positive_values_have_a_log_scale() -> None:
    drawn = draw(Chart("loss", [line(100.0, 10.0, 1.0)]))
    y = places(drawn.lines[0]["path"])[:, 1]
    assert drawn.log and y[1] - y[0] == pytest.approx(y[2] - y[1], abs=0.2)
    assert {"1", "10", "100"} <= {label for _, label in drawn.y_ticks}
    assert not draw(Chart("loss", [line(100.0, 0.0)])).log and not draw(Chart("loss", [line(3.0, 2.0)])).log


@pytest.mark.parametrize(
    "values", [(0.0, 0.0), (1e-4, 1e-4), (5.0,), (-3.0, -3.0), (1e30, -1e30), (1.0, 1.0 + 1e-15), (1e-30, 1e30), (0.0, 1e-30)]
)
def test_any_finite_values_are_inside_of_the_box(values: tuple[float, ...]) -> None:
    drawn = draw(Chart("loss", [line(*values)]))
    found = places(drawn.lines[0]["path"])
    assert (found[:, 0] >= LEFT).all() and (found[:, 0] <= RIGHT).all() and (found >= 0).all() and (found[:, 1] <= BOTTOM).all()
    assert 2 <= len(drawn.y_ticks) <= 12 and len({label for _, label in drawn.y_ticks}) == len(drawn.y_ticks)
    assert all(len(label) <= 8 for _, label in drawn.y_ticks), drawn.y_ticks


def test_noise_is_smoothed_and_a_spike_does_not_flatten_the_rest() -> None:
    y = np.random.default_rng(0).normal(1.0, 0.1, 200)
    y[100] = 1e6
    drawn = draw(Chart("loss", [Line("loss", np.arange(200.0), y, noisy=True)], log=False))
    smooth, raw = places(drawn.lines[0]["path"])[:, 1], places(drawn.lines[0]["raw"])[:, 1]
    assert np.ptp(raw[:80]) > 0.5 * (BOTTOM - TOP) and raw[100] < 0
    assert np.abs(np.diff(smooth[:80])).mean() < 0.3 * np.abs(np.diff(raw[:80])).mean()
    assert not draw(Chart("loss", [line(1.0, 2.0, noisy=True)])).lines[0]["raw"]


def test_more_lines_than_a_chart_holds_are_counted() -> None:
    drawn = draw(Chart("loss", [line(1.0, float(k), label=str(k)) for k in range(40)], ordered=True))
    assert len(drawn.lines) == LINES and drawn.left_out == 40 - LINES
    assert (drawn.lines[0]["label"], drawn.lines[-1]["label"]) == ("0", "39")
    assert (drawn.lines[0]["colour"], drawn.lines[-1]["colour"]) == ("q0", "q6")


def test_a_chart_without_points_is_refused() -> None:
    with pytest.raises(ValueError, match="without a point"):
        draw(Chart("loss", [line()]))


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (0.0, "0"),
        (1234567.0, "1.235M"),
        (0.25, "0.25"),
        (1e-7, "1e-7"),
        (12345.0, "12,345"),
        (-2.5e12, "-2.5T"),
        (float("nan"), "not finite"),
    ],
)
def test_short_numbers(value: float, said: str) -> None:
    assert short(value) == said


def charted(*columns: str, alarms: tuple[Alarm, ...] = ()) -> dict[str, dict[str, list[str]]]:
    run = Record(Path("run"), columns={name: series(1.0, 2.0) for name in columns}, alarms=list(alarms))
    return {
        section: {chart.title: [one.label for one in chart.lines] for chart, _ in made}
        for section, made in curves.charts(run).items()
    }


def test_columns_that_belong_together_share_a_chart() -> None:
    found = charted(
        *("student/loss", "student/lr", "critic/lr", "student/loss/dmd", "student/loss/gan", "critic/loss"),
        *(
            "critic/loss/critic/sigma_0.8-1.0",
            "critic/loss/critic/sigma_0.0-0.2",
            "student/saturation",
            "student/saturation_real",
        ),
        *("held_out/full", "held_out/dropped", "held_out/full/level_1", "held_out/full/level_0", "held_out/full/quantile_2"),
        *("held_out/full/quantile_1", "held_out/dropped/level_0/sigma_0.3", "drift/student/contrast", "drift/teacher/contrast"),
        *("drift/hue", "health/skipped_share", "memory/peak_gib", "time/step_seconds", "gradient/of/another"),
    )
    assert found["Training loss"] == {
        "student: loss": ["loss"],
        "student: parts of the loss": ["distribution matching", "adversary"],
        "student: saturation": ["saturation", "saturation of the data"],
        "critic: loss": ["loss"],
        "critic: loss · critic, by noise level": ["noise 0.0-0.2", "noise 0.8-1.0"],
    }
    assert found["Held-out loss"] == {
        "held-out loss": ["full history", "history dropped"],
        "full history, by level": ["level 0, quarter", "level 1, half"],
        "full history, by quantile": ["quantile 1", "quantile 2"],
        "history dropped · level 0, quarter, by noise level": ["noise 0.3"],
    }
    assert found["Optimizer"] == {"learning rate": ["student", "critic"]}
    assert found["Drift"] == {"contrast": ["student", "teacher"], "hue": ["hue"]}
    assert found["Memory"] == {"peak": ["peak"]} and found["Health"] == {"skipped share": ["skipped share"]}
    assert list(found["Other figures"]) == ["gradient · of · another"]


@pytest.mark.parametrize(
    "column", ["", "/", "held_out", "student", "loss/", "sigma_0.3", "drift", "time/", "level_x", "student/student"]
)
def test_any_name_of_a_column_finds_a_chart(column: str) -> None:
    (made,) = charted(column).values()
    (lines,) = made.values()
    assert len(lines) == 1


def test_alarms_mark_their_chart_with_the_limit() -> None:
    alarm = Alarm(1, "colour", 2.0, 1.5, "", "drift/hue")
    run = Record(Path("run"), columns={"drift/hue": series(1.0, 2.0), "drift/other": series(1.0)}, alarms=[alarm])
    marked, other = (chart for chart, _ in curves.charts(run)["Drift"])
    assert (marked.marks, marked.limit) == ([1], 1.5) and (other.marks, other.limit) == ([], None)
    drawn = draw(marked)
    assert drawn.marks == [(RIGHT, 1)] and drawn.limit and drawn.limit[1] == "1.5" and TOP < drawn.limit[0] < BOTTOM


def test_a_counter_that_never_moved_has_no_chart() -> None:
    run = Record(Path("run"), columns={"skipped": series(0.0, 0.0), "lr": series(1.0)})
    assert [chart.title for chart, _ in curves.charts(run)["Optimizer"]] == ["learning rate"]
    run.columns["skipped"] = series(0.0, 1.0)
    assert [chart.title for chart, _ in curves.charts(run)["Optimizer"]] == ["skipped updates", "learning rate"]
