# Copyright 2026 The trl_cuma authors. Licensed under the Apache License, Version 2.0.
import json

import numpy as np
import pytest
from scipy.spatial.distance import pdist, squareform

from trl_cuma.evaluation.reference_map import classical_map, compare_with_reference, read_reference_map

POINTS = np.random.default_rng(0).normal(size=(8, 2))
NAMES = [f"Group {letter}" for letter in "ABCDEFGH"]
DISTANCE = squareform(pdist(POINTS))


def turned(points: np.ndarray) -> np.ndarray:
    """Rotated by 40°, mirrored, three times as large and elsewhere."""
    angle = np.deg2rad(40)
    rotation = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    return 3 * points @ rotation * [1, -1] + [10, -7]


def reference(points: np.ndarray, names: list[str] = NAMES) -> dict[str, tuple[float, float]]:
    return {name: tuple(point) for name, point in zip(names, points.tolist(), strict=True)}


def test_a_turned_copy_is_the_same_map() -> None:
    found = compare_with_reference(NAMES, DISTANCE, reference(turned(POINTS)))
    assert found.disparity == pytest.approx(0, abs=1e-12) and found.mantel_r == pytest.approx(1)
    np.testing.assert_allclose(found.model_map, found.reference_map, atol=1e-7)
    # of 8! orders none other fits: all that counts is the observed one
    assert found.disparity_p == found.mantel_p == 1 / 1000
    assert found.matched == NAMES and found.unmatched_groups == 0 and found.unmatched_reference == []


def test_a_shuffled_copy_is_not() -> None:
    order = [3, 6, 0, 5, 2, 7, 1, 4]
    found = compare_with_reference(NAMES, DISTANCE, reference(turned(POINTS)[order]), permutations=199)
    assert found.disparity > 0.5 and found.disparity_p > 0.05
    assert found.mantel_r < 0.5 and found.mantel_p > 0.05
    # Mantel's r is the correlation of the 28 distances
    upper = np.triu_indices(8, 1)
    expected = np.corrcoef(DISTANCE[upper], DISTANCE[np.ix_(order, order)][upper])[0, 1]
    assert found.mantel_r == pytest.approx(expected)
    again = compare_with_reference(NAMES, DISTANCE, reference(turned(POINTS)[order]), permutations=199)
    assert again.to_dict() == found.to_dict()
    json.dumps(found.to_dict(), allow_nan=False)


def test_names_that_do_not_match_are_counted_and_only_the_files_own_are_listed() -> None:
    theirs = reference(turned(POINTS)[:6], [f" {name.upper()}" for name in NAMES[:5]] + ["Atlantis"])
    found = compare_with_reference(NAMES, DISTANCE, theirs)
    assert found.matched == NAMES[:5] and found.unmatched_groups == 3 and found.unmatched_reference == ["Atlantis"]
    assert found.disparity == pytest.approx(0, abs=1e-12) and found.note is None


@pytest.mark.parametrize(
    ("distance", "points", "note"),
    [
        (DISTANCE[:4, :4], POINTS[:4], "n/a: 4 groups match the reference's names; it takes 5"),
        (np.zeros((8, 8)), POINTS, "n/a: all of the routers' distances between groups are equal"),
        (1.0 - np.eye(8), POINTS, "n/a: all of the routers' distances between groups are equal"),
        (DISTANCE, np.ones((8, 2)), "n/a: all of the reference's distances between groups are equal"),
    ],
)
def test_what_cannot_be_compared_is_not_available(distance, points, note) -> None:
    found = compare_with_reference(NAMES[: len(distance)], distance, reference(points, NAMES[: len(points)]))
    assert found.note == note and found.disparity is found.mantel_r is found.model_map is None
    json.dumps(found.to_dict(), allow_nan=False)


def test_the_plane_of_distances() -> None:
    """Four corners of a 4 × 2 rectangle; then of a tetrahedron, of whose three equal axes a plane shows two."""
    corners = np.array([[0, 0], [4, 0], [0, 2], [4, 2]])
    plane, share = classical_map(squareform(pdist(corners)))
    np.testing.assert_allclose(squareform(pdist(plane)), squareform(pdist(corners)))
    np.testing.assert_allclose(np.abs(plane), [[2, 1]] * 4)
    assert share == pytest.approx(1)
    assert classical_map(1.0 - np.eye(4))[1] == pytest.approx(2 / 3)
    np.testing.assert_allclose(
        np.abs(classical_map(np.array([[0.0, 6.0], [6.0, 0.0]]))[0]), [[3, 0], [3, 0]], atol=1e-9
    )
    np.testing.assert_array_equal(classical_map(np.zeros((3, 3)))[0], 0)


@pytest.mark.parametrize("suffix", ["csv", "tsv"])
def test_a_file_with_a_header_and_three_columns(tmp_path, suffix) -> None:
    path = tmp_path / f"map.{suffix}"
    lines = ["country,survival,secular", '"Korea. South",0.5,1', "", " Côte d'Ivoire ,-1e-1,-0.25 "]
    text = "\n".join(lines) + "\n"
    path.write_text(text if suffix == "csv" else text.replace(",", "\t"), encoding="utf-8-sig")
    assert read_reference_map(path) == {"Korea. South": (0.5, 1.0), "Côte d'Ivoire": (-0.1, -0.25)}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("A,1,2\nB,2,3", "Line 1 of .* Put a header line"),
        ("name,x\nA,1", "Line 1 of .* has 2 entries. A reference map has three columns"),
        ("name,x,y\nA,1,2\nB,one,2", "Line 3 of .* needs a name and two finite numbers"),
        ("name,x,y\nA,1,inf", "Line 2 of .* needs a name and two finite numbers"),
        ("name,x,y\n,1,2", "Line 2 of .* needs a name and two finite numbers"),
        ("name,x,y\nA,1,2\n\n a ,3,4", "Line 4 of .* has the name of line 2"),
    ],
)
def test_a_file_that_is_no_map_is_an_error(tmp_path, text, message) -> None:
    path = tmp_path / "map.csv"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        read_reference_map(path)
