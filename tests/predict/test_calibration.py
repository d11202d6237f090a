"""A fit finds the terms that measurements were made with, shows what is left, and says where it no longer holds."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from helix_compile.errors import HelixError
from helix_compile.predict.calibration import Calibration, calibrated
from helix_compile.predict.planner import Planned
from helix_compile.predict.search import Goal, Search
from helix_compile.views.plan_text import format_plan
from tests.support.planned import goal, machine, tiny_costed

LAYOUTS = [{"cp": 8, "tpa": 1, "ep": 8}, {"cp": 1, "tpa": 8, "ep": 8}, {"cp": 2, "tpa": 4, "ep": 2}]


def true_machine(asked: Goal) -> Any:
    """What the steps below were "measured" on: 31 us a layer, and collectives 1.75 times as slow as stated."""
    stated = asked.accelerator.latency_us
    slower = {op: tuple((n, 1.75 * low, 1.75 * high) for n, low, high in rows) for op, rows in stated.items()}
    return replace(asked.accelerator, fixed_us_per_layer=31.0, latency_us=slower)


def measured(folder: Path, layouts: list[dict[str, int]] = LAYOUTS, off: float = 0.0, **changes: Any) -> Path:
    asked, rows = goal(), []
    for layout in layouts:
        for batch, context in ((1, 65536), (8, 65536), (8, 131072)):
            own = replace(asked, accelerator=true_machine(asked), batches=(batch,), context=context)
            (candidate, *_) = [
                c
                for c in tiny_costed().choices(8)
                if all(getattr(c, k) == v for k, v in layout.items()) and (c.merge, c.q_proj) == ("a2a", "replicate")
            ]
            step = Search(tiny_costed(), own).of(candidate)[0].step_us * (1 + off * (len(rows) % 2 - 0.5))
            rows.append(
                {**layout, "batch": batch, "context": context, "v_up": candidate.v_up, "step_us": step} | changes
            )
    (folder / "measured.json").write_text(json.dumps({"measurements": rows}))
    return folder / "measured.json"


def fitted(path: Path) -> Calibration:
    return calibrated(path, tiny_costed(), goal())


def test_the_terms_come_back(tmp_path: Path) -> None:
    found = fitted(measured(tmp_path))
    assert found.accelerator.fixed_us_per_layer == pytest.approx(31.0, rel=1e-9)
    assert found.latency_scale == pytest.approx(1.75, rel=1e-9) and found.worst < 1e-9
    true = true_machine(goal()).latency_us
    for op, rows in found.accelerator.latency_us.items():
        assert [r[1] for r in rows] == pytest.approx([r[1] for r in true[op]])


def test_residuals_are_shown_and_are_what_is_left(tmp_path: Path) -> None:
    found = fitted(measured(tmp_path, off=0.08))
    rows = found.facts()["residuals"]
    assert len(rows) == 9 and all(r["measured_us"] - r["fitted_us"] == r["residual_us"] for r in rows)
    assert 0.01 < found.worst < 0.08
    assert abs(sum(r["residual_us"] for r in rows)) < 1e-6 * sum(
        r["measured_us"] for r in rows
    )  # least squares with an offset
    text = format_plan(Planned(tiny_costed(), goal(), found))
    assert "calibration: measured against fitted" in text and f"{rows[0]['measured_us']:,.1f}" in text


def test_one_layout_can_not_tell_latencies(tmp_path: Path) -> None:
    """All of its steps wait for the same collectives: the fixed term takes it, and that is said."""
    single = [{"cp": 1, "tpa": 1, "ep": 1}]
    rows = [{**single[0], "batch": 1, "context": 65536, "step_us": 4 * 50.0 + 10.0}]
    (tmp_path / "one.json").write_text(json.dumps({"measurements": rows}))
    found = fitted(tmp_path / "one.json")
    assert found.latency_scale is None and 40 < found.accelerator.fixed_us_per_layer <= 52.5
    assert "the measurements can't tell it" in found.said(goal())[0]


def test_beyond_what_was_measured_is_said(tmp_path: Path) -> None:
    found = fitted(measured(tmp_path))
    assert found.ranges == {"batch": (1, 8), "context": (65536, 131072), "ranks": (8, 8), "cp": (1, 8)}
    planned = Planned(tiny_costed(), replace(goal(context=1 << 20), accelerator=found.accelerator), found)
    rows = planned.facts["pareto"]
    assert all("context 1,048,576 is outside the measured 65,536 to 131,072" in row["extrapolated"] for row in rows)
    assert any("an extrapolation beyond the calibration" in reason for reason in planned.reasons)
    every = Search(
        tiny_costed(), replace(goal(context=100_000, batches=(4, 9)), accelerator=found.accelerator)
    ).points()
    inside = {(p.batch, p.candidate.ranks) for p in every if found.outside(p, 100_000) == []}
    assert inside == {(4, 8)}  # of batches 4 and 9 on 1, 2, 4 and 8 ranks
    assert "(extrapolated)" in format_plan(planned)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{}", r"expected \{\"measurements\""),
        ('{"measurements": [{"cp": 8, "batch": 1, "context": 9}]}', r"measurements\[0\]: step_us: got None"),
        ('{"measurements": [{"cp": 8, "batch": 1.5, "context": 9, "step_us": 1}]}', "batch: got 1.5"),
        ('{"measurements": [{"cp": 8, "kvp": 1}]}', "'kvp' is no field"),
        (
            '{"measurements": [{"cp": 8, "ep": 5, "batch": 1, "context": 9, "step_us": 1}]}',
            "is no layout of this model",
        ),
        ("{", "can't be read"),
        *(
            (f'{{"measurements": [{{"cp": 8, "batch": 1, "context": 9, "step_us": 1, {own}}}]}}', message)
            for own, message in (
                ('"tpa": "x"', "tpa: got 'x', expected a number >= 1"),
                ('"ep": -2', "ep: got -2, expected a number >= 1"),
                ('"context": 1', "context: got 1, expected a number >= 2"),
                ('"step_us": NaN', "step_us: got nan, expected a number > 0"),
                ('"tpa": 10', "cp=8, tpa=10: 80 ranks; the link of gb200 joins 72"),
                ('"overlap": "hopb"', "batch: got 1, expected 2 or more sequences with overlap='hopb'"),
            )
        ),
    ],
)
def test_refusals(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "m.json").write_text(content)
    with pytest.raises(HelixError, match=message):
        calibrated(tmp_path / "m.json", tiny_costed(), goal(accelerator=machine()))
