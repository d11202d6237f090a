"""--calibrate: the fixed terms fitted to what a user measured. The roofline stays; residuals and the range of the fit are said.

    step  =  roofline + bytes on the link  +  fixed * layers  +  scale * latencies          fixed, scale >= 0: least squares

measured.json: {"measurements": [{"cp": 8, "tpa": 1, "ep": 8, "batch": 4, "context": 131072, "step_us": 9000.0}, ...]}; merge, q_proj, v_up
and pad_heads may be given too. Steps are of the command's weights and cache. What was measured is never called predicted, nor the reverse.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from helix_compile.config.options import default_ep
from helix_compile.errors import HelixError
from helix_compile.predict.accelerators import Accelerator, read_mapping
from helix_compile.predict.costed import Candidate, CostedModel
from helix_compile.predict.search import Goal, Point, Search

_NUMBERS = ("cp", "tpa", "ep", "batch", "context", "step_us")
_DEFAULTED = ("tpa", "ep")
_WORDS = ("merge", "q_proj", "v_up", "pad_heads", "overlap")


@dataclass(frozen=True)
class Measurement:
    """One step that a user timed."""

    candidate: Candidate
    batch: int
    context: int
    step_us: float


@dataclass(frozen=True)
class Calibration:
    """The fit.

    Attributes:
        accelerator: with the fitted terms.
        latency_scale: what stated latencies were multiplied by; None where the measurements can't tell.
        rows: each measurement, measured and fitted.
    """

    accelerator: Accelerator
    latency_scale: float | None
    rows: tuple[tuple[Measurement, float], ...]

    @property
    def ranges(self) -> dict[str, tuple[int, int]]:
        """What was measured, from and to."""
        values = {
            "batch": [m.batch for m, _ in self.rows],
            "context": [m.context for m, _ in self.rows],
            "ranks": [m.candidate.ranks for m, _ in self.rows],
            "cp": [m.candidate.cp for m, _ in self.rows],
        }
        return {name: (min(own), max(own)) for name, own in values.items()}

    def outside(self, point: Point, context: int) -> list[str]:
        """How a point lies beyond what was measured; [] if it does not."""
        own = {"batch": point.batch, "context": context, "ranks": point.candidate.ranks, "cp": point.candidate.cp}
        return [
            f"{name} {own[name]:,} is outside the measured {low:,} to {high:,}"
            for name, (low, high) in self.ranges.items()
            if not low <= own[name] <= high
        ]

    @property
    def worst(self) -> float:
        """The largest residual, as a share of what was measured."""
        return max(abs(fitted - m.step_us) / m.step_us for m, fitted in self.rows)

    def said(self, goal: Goal) -> list[str]:
        """For the assumptions."""
        scale = (
            "as stated: the measurements can't tell it" if self.latency_scale is None else f"x {self.latency_scale:.3g}"
        )
        ranges = ", ".join(f"{name} {low:,} to {high:,}" for name, (low, high) in self.ranges.items())
        return [
            f"calibrated: {self.accelerator.fixed_us_per_layer:.3g} us a layer, latencies {scale}; fitted to {len(self.rows)} measured "
            f"steps, largest residual {self.worst:.1%}; measured were {ranges}; beyond that it is an extrapolation, and said so"
        ]

    def facts(self) -> dict[str, Any]:
        """As JSON; `measured_us` was measured, `fitted_us` is predicted."""
        return {
            "fixed_us_per_layer": self.accelerator.fixed_us_per_layer,
            "latency_scale": self.latency_scale,
            "ranges": {name: list(own) for name, own in self.ranges.items()},
            "residuals": [
                {
                    "cp": m.candidate.cp,
                    "tpa": m.candidate.tpa,
                    "ep": m.candidate.ep,
                    "batch": m.batch,
                    "context": m.context,
                    "measured_us": m.step_us,
                    "fitted_us": fitted,
                    "residual_us": m.step_us - fitted,
                }
                for m, fitted in self.rows
            ],
        }


def calibrated(path: Path, model: CostedModel, goal: Goal) -> Calibration:
    """The goal's accelerator, its fixed terms fitted.

    Raises:
        HelixError: no measurements, a field that is missing, of another kind or unknown, a layout that the model can't have.
    """
    measured = list(_measurements(path, model, goal))
    bare = replace(goal.accelerator, fixed_us_per_layer=0.0, launch_us=0.0, latency_us=_scaled(goal.accelerator, 0.0))
    stated = replace(bare, latency_us=goal.accelerator.latency_us)
    roofline = [_step_us(model, goal, bare, m) for m in measured]
    latency = [_step_us(model, goal, stated, m) - r for m, r in zip(measured, roofline, strict=True)]
    left = [m.step_us - r for m, r in zip(measured, roofline, strict=True)]
    fixed, scale = _fit(model.layers, latency, left)
    accelerator = replace(
        goal.accelerator,
        fixed_us_per_layer=fixed,
        launch_us=0.0,
        latency_us=_scaled(goal.accelerator, 1.0 if scale is None else scale),
    )
    used = 1.0 if scale is None else scale
    fitted = (r + fixed * model.layers + used * own for r, own in zip(roofline, latency, strict=True))
    return Calibration(accelerator, scale, tuple(zip(measured, fitted, strict=True)))


def _fit(layers: int, latency: list[float], left: list[float]) -> tuple[float, float | None]:
    """(us a layer, scale of latencies), neither negative; the scale None where all measured steps have the same latencies."""
    n, mean, middle = len(left), sum(latency) / len(latency), sum(left) / len(left)
    spread = sum((x - mean) ** 2 for x in latency)
    if n < 2 or spread <= 1e-9 * max(1.0, mean) ** 2:
        return max(0.0, middle - mean) / layers, None
    scale = sum((x - mean) * (y - middle) for x, y in zip(latency, left, strict=True)) / spread
    if scale < 0:
        return max(0.0, middle) / layers, 0.0
    fixed = (middle - scale * mean) / layers
    if fixed < 0:
        return 0.0, max(0.0, sum(x * y for x, y in zip(latency, left, strict=True)) / sum(x * x for x in latency))
    return fixed, scale


def _step_us(model: CostedModel, goal: Goal, accelerator: Accelerator, m: Measurement) -> float:
    own = replace(goal, accelerator=accelerator, context=m.context, batches=(m.batch,))
    return Search(model, own).of(m.candidate)[0].step_us


def _scaled(accelerator: Accelerator, times: float) -> dict[str, Any]:
    return {
        op: tuple((n, low * times, high * times) for n, low, high in rows)
        for op, rows in accelerator.latency_us.items()
    }


def _measurements(path: Path, model: CostedModel, goal: Goal) -> Iterable[Measurement]:
    rows = read_mapping(path, "--calibrate").get("measurements")
    if not isinstance(rows, list) or not rows:
        raise HelixError(f'--calibrate {path}: expected {{"measurements": [...]}} with at least one, got {rows!r}')
    for i, row in enumerate(rows):
        where = f"--calibrate {path}: measurements[{i}]"
        if not isinstance(row, dict):
            raise HelixError(f"{where}: got {row!r}, expected a table")
        if unknown := [key for key in row if key not in (*_NUMBERS, *_WORDS)]:
            raise HelixError(f"{where}: {unknown[0]!r} is no field; expected some of {', '.join((*_NUMBERS, *_WORDS))}")
        for key in (k for k in _NUMBERS if k in row or k not in _DEFAULTED):
            value: Any = row.get(key)
            least = 2 if key == "context" else 1 if key != "step_us" else 0
            kinds = int if key != "step_us" else (int, float)
            good = isinstance(value, kinds) and not isinstance(value, bool) and math.isfinite(value)
            if not good or value < least or value == 0:
                expected = f"a number >= {least}" if least else "a number > 0"
                raise HelixError(f"{where}: {key}: got {value!r}, expected {expected}")
        candidate = _candidate(where, row, model, goal.accelerator)
        if row["batch"] < candidate.least_batch:
            raise HelixError(
                f"{where}: batch: got {row['batch']}, expected {candidate.least_batch} or more sequences with overlap={candidate.overlap!r}"
            )
        yield Measurement(candidate, row["batch"], row["context"], float(row["step_us"]))


def _candidate(where: str, row: dict[str, Any], model: CostedModel, accelerator: Accelerator) -> Candidate:
    cp, tpa = row["cp"], row.get("tpa", 1)
    ranks = cp * tpa
    if ranks > accelerator.link_ranks:
        raise HelixError(
            f"{where}: got cp={cp}, tpa={tpa}: {ranks} ranks; the link of {accelerator.name} joins {accelerator.link_ranks}, and layouts of more "
            "are not costed"
        )
    experts = min(model.experts, default=0)
    ep = row.get("ep") or default_ep(ranks, experts)
    asked = {"cp": cp, "tpa": tpa, "ep": ep} | {k: row[k] for k in _WORDS if k in row}
    legal = list(model.choices(ranks))
    found = [c for c in legal if all(getattr(c, k) == v for k, v in asked.items())]
    if not found:
        near = sorted({(c.cp, c.tpa, c.ep) for c in legal})
        raise HelixError(
            f"{where}: {asked} is no layout of this model; (cp, tpa, ep) on {ranks} ranks are some of {near}"
        )
    # what a row does not say is as helix_compile has it
    defaults = {"merge": "a2a", "q_proj": "replicate", "overlap": "none", "v_up": model.v_up(row["batch"])}
    plain = [c for c in found if cp == 1 or all(getattr(c, k) == d for k, d in defaults.items() if k not in row)]
    return (plain or found)[0]
