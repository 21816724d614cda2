"""Test the normalisation of locations, and the table of neighbours."""

import numpy as np
import pytest

from data.layout import StoreError, load_locations
from data.locations import neighbor_table, normalize_locations


def test_locations_are_normalised_by_the_tables_maximum():
    table = np.array([[26, 130, 0], [52, 260, 0], [104, 0, 0]])
    wanted = [[-0.5, 0.0, -1.0], [0.0, 1.0, -1.0], [1.0, -1.0, -1.0]]  # an axis with only zeros becomes -1
    normalised = normalize_locations(table)
    assert normalised.dtype == np.float32
    np.testing.assert_allclose(normalised, wanted, atol=1e-7)


def literal_neighbors(table, k):
    """Return the k nearest locations by sorting (distance, index) pairs."""
    result = []
    for a in range(len(table)):
        pairs = sorted(
            (sum((int(x) - int(y)) ** 2 for x, y in zip(table[a], table[b])), b) for b in range(len(table)) if b != a
        )
        result.append([b for _, b in pairs[:k]])
    return np.array(result)


@pytest.mark.parametrize("k", [1, 2, 5])
def test_ties_are_ordered_by_index(grid, k):
    np.testing.assert_array_equal(neighbor_table(grid, k), literal_neighbors(grid, k))
    assert neighbor_table(grid, 2)[0].tolist() == [1, 2]  # locations 1, 2 and 4 are all at distance 26 from location 0


def test_fewer_locations_than_neighbors(grid):
    with pytest.raises(StoreError, match="--k-neighbors 6 must be below the number of locations, which is 6"):
        neighbor_table(grid, 6)


@pytest.mark.reference
def test_published_table(reference):
    table = load_locations(reference / "atlas_patch_loc.npy")
    assert table.shape == (581, 3)
    neighbors = neighbor_table(table, 3)
    np.testing.assert_array_equal(neighbors, literal_neighbors(table, 3))
    distances = ((table[:, None] - table[None]) ** 2).sum(-1)
    ties = sum(np.partition(row, 3)[3] == np.partition(row, 2)[2] for row in distances)
    assert ties > 500  # equal distances are common, so their order must be defined
    # The corner of location 0 is (26, 130, 26). Half of the largest x, y and z in the table is 156, 143 and 143.
    np.testing.assert_allclose(normalize_locations(table)[0], [26 / 156 - 1, 130 / 143 - 1, 26 / 143 - 1], atol=1e-6)


@pytest.mark.parametrize(
    ("table", "message"),
    [
        (np.zeros((3, 2), dtype=np.int64), "has shape"),
        (np.zeros((0, 3), dtype=np.int64), "has shape"),
        (np.zeros((3, 3)), "has dtype float64"),
        (np.array([[0, 0, -1]]), "negative"),
        (np.array([[1, 2, 3], [1, 2, 3]]), "more than one row"),
    ],
)
def test_bad_tables_are_refused(tmp_path, table, message):
    np.save(tmp_path / "t.npy", table)
    with pytest.raises(StoreError, match=message):
        load_locations(tmp_path / "t.npy")
    (tmp_path / "broken.npy").write_bytes(b"no array")
    with pytest.raises(StoreError, match=r"broken\.npy is not a location table: it is not a complete \.npy file"):
        load_locations(tmp_path / "broken.npy")
    with pytest.raises(StoreError, match=r"absent\.npy cannot be read: No such file"):
        load_locations(tmp_path / "absent.npy")
