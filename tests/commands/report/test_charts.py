from __future__ import annotations

import json
import math
import re
from html import unescape
from itertools import pairwise
from xml.etree import ElementTree

import pytest

from lightning_sft.commands.report.charts import bar_chart, line_chart, short, ticks


@pytest.mark.parametrize(("low", "high"), [(0.0, 1.0), (-3.2, 17.9), (1e-6, 3e-6), (1, 1e9), (0.998, 1.003)])
def test_ticks_are_round_span_the_interval_and_are_few(low: float, high: float) -> None:
    found = ticks(low, high, 5)
    assert found[0] <= low
    assert found[-1] >= high
    assert 3 <= len(found) <= 8
    steps = {round((b - a) / (found[1] - found[0]), 6) for a, b in pairwise(found)}
    assert steps == {1.0}
    mantissa = (found[1] - found[0]) / 10 ** math.floor(math.log10(found[1] - found[0]) + 1e-9)
    assert round(mantissa, 6) in (1, 2, 2.5, 5)


def test_a_curve_is_where_its_axes_say() -> None:
    chart = line_chart("Loss", {"training": [(5, 2.0), (10, 0.0), (20, 1.0)]})
    svg = ElementTree.fromstring(re.search(r"<svg.*</svg>", chart, re.DOTALL)[0])
    path = next(p.get("d", "") for p in svg.iter("path") if "line" in (p.get("class") or "").split())
    points = [tuple(map(float, pair.split(","))) for pair in path[1:].split("L")]
    labels = {t.text: (float(t.get("x", 0)), float(t.get("y", 0)) - 4) for t in svg.iter("text")}
    for (_, y), value in zip(points, ("2", "0", "1"), strict=True):
        assert y == pytest.approx(labels[value][1], abs=0.2)
    assert points[1][0] == pytest.approx(labels["10"][0], abs=0.2)
    assert json.loads(unescape(svg.get("data-chart", "")))["curves"][0][1] == [[5, 2.0], [10, 0.0], [20, 1.0]]
    assert svg.get("aria-label") == "Loss: training from 2 to 1"


def test_long_curves_are_thinned_to_means_and_gaps_are_left_out() -> None:
    chart = line_chart(
        "x", {"y": [(i, float(i % 2)) for i in range(10_000)] + [(10_000, math.nan), (10_001, math.inf)]}
    )
    assert len(chart) < 60_000
    data = json.loads(unescape(re.search(r'data-chart="([^"]*)"', chart)[1]))
    points = data["curves"][0][1]
    assert len(points) <= 400
    assert all(abs(y - 0.5) <= 0.05 for _, y in points)
    assert "nan" not in chart


@pytest.mark.parametrize("points", [[(5, 0.0)], [(1, 3.0), (2, 3.0)], [(0, -1.0), (1, 0.0)]])
def test_flat_and_single_points_are_drawn(points: list[tuple[float, float]]) -> None:
    for number in re.findall(r"-?\d+\.\d+|nan", line_chart("x", {"y": points})):
        assert math.isfinite(float(number))


def test_names_are_text_and_nothing_to_show_is_no_card() -> None:
    evil = "<script>x</script>\"'"
    for chart in (line_chart(evil, {evil: [(1, 1.0)]}, evil, evil), bar_chart(evil, [(evil, 1.0), (evil, 0.0)], evil)):
        assert "<script" not in chart
        ElementTree.fromstring(re.search(r"<svg.*</svg>", chart, re.DOTALL)[0])
    assert line_chart("x", {}) == bar_chart("x", []) == ""


def test_figures_are_short() -> None:
    assert [short(x) for x in (999.4, 1000, 2.5e9, -0.5, 1e-9)] == ["999", "1,000", "2.5G", "-0.5", "1e-09"]


@pytest.mark.parametrize("values", [(10.7761, 10.7993), (0.9, 5.1), (1e-7, 3e-7), (12_345.1, 12_345.9)])
def test_the_numbers_beside_an_axis_are_not_the_same(values: tuple[float, float]) -> None:
    chart = line_chart("Loss", {"validation": list(enumerate(values))})
    beside = re.findall(r'<text x="44"[^>]*>([^<]+)<', chart)
    assert len(beside) >= 3
    assert len(set(beside)) == len(beside)
