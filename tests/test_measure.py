"""Measures of shapes that are known by hand; the agreement of two observers."""

import math

import cv2
import numpy as np
import pytest
from conftest import call, write
from skimage.morphology import skeletonize

from retina_seg.analysis.agreement import AGREEMENT, agreement, icc
from retina_seg.analysis.measure import fractal_dimensions, measure
from retina_seg.analysis.measure_masks import DONE, WHOLE, measure_masks
from retina_seg.utils import UserError, read_csv

Y, X = np.mgrid[:320, :320].astype(float)
FOV = np.ones(X.shape, bool)


def bar(width: float, degrees: float, length: float = 200) -> np.ndarray:
    """A bar (320, 320) bool through a point beside the middle of the frame."""
    y, x, angle = Y - 160.3, X - 160.1, math.radians(degrees)
    along, across = x * math.cos(angle) + y * math.sin(angle), y * math.cos(angle) - x * math.sin(angle)
    return (np.abs(along) <= length / 2) & (np.abs(across) <= width / 2)


def tree(depth: int, width: float, turn: float) -> np.ndarray:
    """A binary tree (900, 900) bool with 2 ** depth leaves."""
    mask = np.zeros((900, 900), np.uint8)

    def grow(x: float, y: float, angle: float, length: float, width: float, depth: int) -> None:
        end = x + length * math.cos(angle), y + length * math.sin(angle)
        cv2.line(mask, (round(x), round(y)), (round(end[0]), round(end[1])), 1, max(1, round(width)))
        for side in (-0.66, 0.66) if depth else ():
            grow(*end, angle + side, 0.72 * length, 0.79 * width, depth - 1)

    angle = math.radians(turn - 90)
    grow(450 - 380 * math.cos(angle), 450 - 380 * math.sin(angle), angle, 190, width, depth)
    return mask > 0


@pytest.mark.parametrize("width", [3, 4, 6, 9, 15])
@pytest.mark.parametrize("degrees", [0, 5, 22.5, 26.6, 45, 70, 90])
def test_bar(width: int, degrees: float) -> None:
    found = measure(bar(width, degrees), FOV, pixel_size=8)
    assert found["length_px"] == pytest.approx(200, rel=0.02)
    for name in ("mean", "median", "p10", "p90"):
        assert found[f"calibre_{name}_px"] == pytest.approx(width, abs=0.5 if name[0] == "m" else 1)
    assert found["calibre_mean_um"] == pytest.approx(8 * found["calibre_mean_px"])
    assert found["length_pct"] == pytest.approx(found["length_px"] / 3.2)
    assert found["length_density_per_mm"] == pytest.approx(found["length_px"] / 320**2 / 0.008)
    assert found["end_density_per_fov2"] == pytest.approx(2)  # the field is as long as wide
    assert (found["branch_points"], found["end_points"]) == (0, 2)
    assert found["tortuosity_mean"] == pytest.approx(1, abs=0.02)


T = np.linspace(0, 1, 3001)
PATHS = {f"arc {r}": (160 - r * np.cos(math.pi * T), 160 - r * np.sin(math.pi * T), r**-2) for r in (50, 80, 120)}
PATHS |= {f"sine {a}": (10 + 300 * T, 160 + a * np.sin(4 * np.pi * T), None) for a in (10, 20, 30)}


@pytest.mark.parametrize("name", PATHS)
def test_path(name: str) -> None:
    x, y, squared = PATHS[name]
    mask = np.zeros(X.shape, np.uint8)
    cv2.polylines(mask, [np.rint(np.stack([x, y], axis=1) * 16).astype(np.int32)], False, 1, 5, shift=4)
    found, length = measure(mask > 0, FOV), np.hypot(np.diff(x), np.diff(y)).sum()
    assert found["tortuosity_mean"] == pytest.approx(length / np.hypot(x[-1] - x[0], y[-1] - y[0]), rel=0.03)
    assert found["length_px"] == pytest.approx(length + 6, rel=0.02)  # with the ends of the pen
    assert squared is None or found["curvature2_median_per_px2"] == pytest.approx(squared, rel=0.05)


@pytest.mark.parametrize("depth", [1, 2, 3])
@pytest.mark.parametrize(("width", "turn"), [(3, 0), (5, 30), (9, 17), (13, 72)])
def test_tree(depth: int, width: int, turn: float) -> None:
    mask = tree(depth, width, turn)
    found = measure(mask, np.ones_like(mask))
    assert (found["branch_points"], found["end_points"]) == (2**depth - 1, 2**depth + 1)


def test_spurs_crossings_and_diagonals() -> None:
    spur = (np.abs(X - 160) < 2) & (Y > 160) & (Y < 172)
    one, other = np.roll(bar(4, 45, 100), -80, axis=1), np.roll(bar(4, 135, 100), 80, axis=1)
    assert min(skeletonize(one).sum(), skeletonize(other).sum()) < 40  # the quicker skeleton loses half of it
    for mask, expected in (
        (bar(15, 0) | spur, (0, 2, 200)),
        (bar(15, 0) | bar(15, 90), (1, 4, 400)),
        (one | other, (0, 4, 200)),
    ):
        found = measure(mask, FOV, quadrants=False)
        assert [found[name] for name in ("branch_points", "end_points")] == [*expected[:2]]
        assert found["length_px"] == pytest.approx(expected[2], rel=0.02)


def test_fractal_dimensions() -> None:
    carpet = np.ones((1, 1), bool)
    for _ in range(5):
        carpet = np.kron(np.array([[1, 1, 1], [1, 0, 1], [1, 1, 1]], bool), carpet)
    for mask, known in ((FOV, 2), (np.eye(320, dtype=bool), 1), (Y == 7, 1), (carpet, 1.893)):
        *found, r2, smallest, largest = fractal_dimensions(mask).values()
        assert found == pytest.approx([known] * 3, abs=0.05) and r2 > 0.99
        assert 2 <= smallest < largest == len(mask) / 4


@pytest.mark.parametrize(("turns", "step"), [(0, -1), (1, 1), (2, 1), (3, -1)])
def test_orientation(turns: int, step: int) -> None:
    mask = cv2.GaussianBlur(np.random.default_rng(3).normal(size=(150, 201)), (0, 0), 3) > 0.05
    fov = np.hypot(*(np.mgrid[:150, :201] - np.array([70, 90])[:, None, None])) < 85
    before, after = (measure(*pair) for pair in ((mask, fov), [np.rot90(a[:, ::step], turns) for a in (mask, fov)]))
    whole = [name for name in before if not name.startswith(("top", "bottom"))]
    assert {name: after[name] for name in whole} == pytest.approx({name: before[name] for name in whole}, rel=1e-9)


def test_ring_in_regions() -> None:
    ring = np.abs(np.hypot(Y - 160, X - 150) - 50) <= 2.5
    found = measure(ring, FOV, disc=(150, 160, 40))  # zone B 40 to 60 pixels from the centre, zone C to 100
    assert found["zone_b_length_px"] == pytest.approx(100 * math.pi, rel=0.02) == found["zone_c_length_px"]
    assert found["zone_c_inside_pct"] == pytest.approx(100, abs=1)
    assert found["calibre_mean_px"] == pytest.approx(5, abs=0.5)
    assert found["top_left_length_px"] > found["top_right_length_px"] > 0
    assert found["tortuosity_mean"] is None and (found["branch_points"], found["end_points"]) == (0, 0)


def test_undefined_is_none() -> None:
    empty = np.zeros_like(FOV)
    assert set(measure(FOV, empty, 5, (9, 9, 5)).values()) == set(measure(FOV, FOV).values()) == {None}
    nothing = measure(empty, FOV)
    assert nothing["area_pct"] == nothing["length_px"] == nothing["end_points"] == 0
    names = ("calibre_mean_px", "tortuosity_mean", "curvature2_median_per_px2", "fractal_d0")
    assert {nothing[name] for name in names} == {None}
    for bad in ({"pixel_size": 0.0}, {"disc": (1, 1, 0)}, {"pixel_size": math.nan}):
        with pytest.raises(ValueError, match="finite"):
            measure(FOV, FOV, **bad)


def test_agreement() -> None:
    judges = np.array([[9, 2, 5, 8], [6, 1, 3, 2], [8, 4, 6, 8], [7, 1, 2, 6], [10, 5, 6, 9], [6, 2, 4, 7]])
    assert icc(judges) == pytest.approx(0.29, abs=0.005)  # Shrout and Fleiss 1979, table 4
    assert math.isnan(icc(np.full((7, 2), 0.1)))  # whose mean is rounded
    found = agreement(np.array([[1.0, 2.0], [2.0, 4.0], [3.0, 3.0], [8.0, 9.0]]))
    assert (found["n"], found["mean"], found["bias"]) == (4, 4.5, -1)
    assert found["upper"] - found["bias"] == pytest.approx(1.96 * math.sqrt(2 / 3)) == found["bias"] - found["lower"]
    assert agreement(np.ones((1, 2))) == {"n": 1}


@pytest.fixture
def folders(tmp_path):
    """Predictions of images 1 to 3, in fields of view, and masks of 1 to 4; the third is damaged."""
    for number, width in ((1, 5), (2, 7), (3, 9), (4, 5)):
        write(tmp_path / f"masks/{number}_manual1.png", bar(width + 1, 0))
        for name, mask in {"vessels": bar(width, 0), "fov": X < 160, "overlay": FOV}.items() if number < 4 else ():
            write(tmp_path / f"ours/{number}_{name}.png", mask)
    (tmp_path / "masks/3_manual1.png").write_text("no image")
    return tmp_path / "ours", tmp_path / "masks"


def test_command_and_agreement(folders, tmp_path, capsys) -> None:
    (ours, masks), table = folders, tmp_path / "table.csv"
    assert call("measure", ours, "--output", table, "--pixel-size", 10, "--against", masks) == 1
    said = capsys.readouterr()
    assert "3_manual1.png: is not an image" in said.err and "4_manual1.png: has no mask to compare with" in said.err
    assert "5 measured, 2 failed" in said.out and "calibre_mean_um" in said.out
    rows = read_csv(table, ["input", "status", "length_px", "calibre_mean_um"])
    assert [row["name"] for row in rows] == ["1", "2", "3", "1", "2", "3", "4_manual1"] and not rows[5]["length_px"]
    assert float(rows[0]["length_px"]) == pytest.approx(100, rel=0.02) and rows[0]["remark"] == ""
    row = {row["measure"]: row for row in read_csv(tmp_path / "table_agreement.csv", AGREEMENT)}["calibre_mean_um"]
    assert row["n"] == "2" and float(row["bias"]) == pytest.approx(-10, abs=0.1)


def test_discs_fields_and_what_is_no_mask(folders, tmp_path) -> None:
    (ours, masks), table, discs = folders, tmp_path / "table.csv", tmp_path / "discs.csv"
    discs.write_text("name;x;y;diameter\n1.jpg;160;160;40\n2.jpg;500;160;40\n")
    one, two, three = measure_masks([ours], table, discs=discs, progress=False)[0]
    assert one["zone_b_length_px"] > 0
    assert "disc does not lie in" in two["status"] and "no optic disc" in three["remark"]
    write(masks / "3_manual1.png", np.full((50, 50, 3), np.arange(50)[:, None] * 4, np.uint8))
    one, _, photo, _ = measure_masks([masks], table, progress=False)[0]
    assert one["remark"] == WHOLE and one["status"] == DONE and "no mask" in photo["status"]
    one, *_, four = measure_masks([masks], table, fov=ours, progress=False)[0]
    assert one["length_px"] == pytest.approx(100, rel=0.02) and "no field of view" in four["status"]
    write(tmp_path / "1.png", bar(5, 0)[:300])
    rows = measure_masks([masks / "1_manual1.png"], table, against=tmp_path / "1.png", progress=False)[0]
    assert rows[1]["status"].startswith("is 320x300 but") and "length_px" not in rows[1]
    discs.write_text("name,x,y,diameter\nother,1,2,3\n")
    bad = {"output": tmp_path / "x.png", "pixel_size": -1, "fov": tmp_path / "none", "discs": discs, "against": discs}
    for name, value in bad.items():
        with pytest.raises(UserError):
            measure_masks([ours], **{"output": tmp_path / "new.csv", name: value}, progress=False)
    assert not (tmp_path / "new.csv").exists()
