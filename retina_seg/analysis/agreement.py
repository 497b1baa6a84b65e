"""How well two methods agree on what both have measured: intraclass correlation, bias, limits of agreement."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from retina_seg.inference.batch import MEASURES

AGREEMENT = ("measure", "n", "mean", "bias", "lower", "upper", "icc")


def agreement(values: np.ndarray) -> dict[str, float]:
    """How well two methods agree that measured the same n images: `values` (n, 2) float, the second is the reference.

    "mean": of the reference. "bias": mean of first minus second; "lower", "upper": limits of agreement, bias -/+ 1.96
    standard deviations of the differences (Bland and Altman 1986). "icc": `icc`. Fewer than two images have "n" alone.
    """
    n = len(values)
    if n < 2:
        return {"n": n}
    differences = values[:, 0] - values[:, 1]
    bias, spread = float(differences.mean()), 1.96 * float(differences.std(ddof=1))
    limits = {"bias": bias, "lower": bias - spread, "upper": bias + spread}
    return {"n": n, "mean": float(values[:, 1].mean()), **limits, "icc": icc(values)}


def icc(values: np.ndarray) -> float:
    """ICC(2,1) of `values` (n subjects, k raters): two-way random effects, absolute agreement, one rater.

    Shrout and Fleiss (1979); ICC(A,1) of McGraw and Wong (1996). At most 1; NaN where nothing differs.
    """
    values, (n, k) = values - values[0, 0], values.shape  # exactly 0 where nothing differs
    subjects, raters = k * values.mean(axis=1).var(ddof=1), n * values.mean(axis=0).var(ddof=1)
    rest = n * k * values.var() - (n - 1) * subjects - (k - 1) * raters
    error = rest / ((n - 1) * (k - 1))  # as the two above, a mean square
    whole = subjects + (k - 1) * error + k * (raters - error) / n
    return float((subjects - error) / whole) if whole > 0 else math.nan


def agreement_table(rows: list[dict], others: list[dict], measures: Sequence[str]) -> list[dict[str, Any]]:
    """`agreement` of `rows` with `others`, joined by name, for each of `measures` that is defined in both of two images."""
    by_name = {row["name"]: row for row in others}
    pairs = [(row, by_name[row["name"]]) for row in rows if row["name"] in by_name]
    table = []
    for measure_name in measures:
        values = [(a.get(measure_name), b.get(measure_name)) for a, b in pairs]
        known = [pair for pair in values if None not in pair]
        table.append({"measure": measure_name, **agreement(np.array(known, float).reshape(-1, 2))})
    return table


def agreement_lines(table: list[dict[str, Any]]) -> list[str]:
    """The agreement on the area density and on `MEASURES` in the whole field, for people."""
    lines = [f"{'measure':<28}" + "".join(f"{name:>11}" for name in AGREEMENT[1:])]
    for row in table:
        if row["measure"] in ("area_pct", *MEASURES):
            numbers = "".join(f"{row[name]:>11.4g}" if name in row else f"{'-':>11}" for name in AGREEMENT[1:])
            lines.append(f"{row['measure']:<28}{numbers}")
    return lines if table else []
