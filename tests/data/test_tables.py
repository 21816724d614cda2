"""Test tables with sids: a sid is read as text, and no sid may name a path outside its folder."""

import pytest

from data.layout import StoreError
from data.tables import check_sid, read_table


@pytest.mark.parametrize("sid", ["007", "10005Q_INSP", "a.b-c", "été", "x 1", "A+B@2"])
def test_valid_sids(sid):
    check_sid(sid)


@pytest.mark.parametrize(
    "sid",
    ["", ".", "..", "../x", "a/b", "a\\b", ".hidden", "a..b", "-x", "a\nb", "a\0", "~x", "$(x)", "a;b", "x" * 200],
)
def test_invalid_sids_are_refused(sid):
    with pytest.raises(StoreError, match="cannot be a file name"):
        check_sid(sid)


def test_text_stays_text(tmp_path):
    (tmp_path / "t.csv").write_bytes("\ufeffsid,image\n007, a.nii\n1e5,b.nii\nNA,c.nii\n".encode())
    table = read_table(tmp_path / "t.csv", ("sid", "image"))
    assert table["sid"].tolist() == ["007", "1e5", "NA"] and table["image"].tolist() == ["a.nii", "b.nii", "c.nii"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("sid\n", "no rows"),
        ("", "cannot be read"),
        ("sid,image\n../x,a\n", "line 2: sid '../x'"),
        ("sid,image\na,1\nb,2\na,3\n", "'a' more than once"),
        ("name,image\na,1\n", "no column 'sid'; its columns are name, image"),
        ("sid,image\n1.23457E+11,a\n", "sid '1.23457E\\+11', a long number that a spreadsheet has shortened"),
        ("sid,a,a\n1,2,3\n", "cannot be read as a CSV table: it has column 'a' twice"),
        ("SID,image\na,1\n", "no column 'sid'; its columns are SID, image; write sid instead of SID"),
    ],
)
def test_bad_tables_are_refused(tmp_path, text, message):
    (tmp_path / "t.csv").write_text(text)
    with pytest.raises(StoreError, match=message):
        read_table(tmp_path / "t.csv")


def test_a_missing_file_is_refused(tmp_path):
    with pytest.raises(StoreError, match="does not exist or is not a file"):
        read_table(tmp_path / "none.csv")


def test_trailing_commas_are_ignored_and_extra_cells_refused(tmp_path):
    (tmp_path / "t.csv").write_text("sid,age,,\n007,55,\n,,\n008,60,,\n  \n,\n")
    table = read_table(tmp_path / "t.csv")
    assert table["sid"].tolist() == ["007", "008"] and table["age"].tolist() == ["55", "60"]
    (tmp_path / "t.csv").write_text("sid,image\n007,a.nii\n008,b.nii,c\n")
    with pytest.raises(StoreError, match="line 3 has more cells than the header, which has 2"):
        read_table(tmp_path / "t.csv")


def test_other_encodings_are_refused(tmp_path):
    for encoding in ("latin-1", "utf-16"):
        (tmp_path / "t.csv").write_bytes("sid,image\nMüller,a.nii\n".encode(encoding))
        with pytest.raises(StoreError, match="is not UTF-8 text"):
            read_table(tmp_path / "t.csv", ("sid", "image"))


@pytest.mark.parametrize(
    ("text", "ages"),
    [
        ("sid;age;name\n007;1,5;a, b\n008;-2;\n009;;c\n", ["1.5", "-2", ""]),
        ("sep=;\nsid;age;name\n007;1,5;a, b\n008;2,25;\n009;1e3;c\n", ["1.5", "2.25", "1e3"]),
        ("sid\tage\tname\n007\t1.5\ta, b\n008\t2\t\n009\t3\tc\n", ["1.5", "2", "3"]),
        ('"sep=,"\nsid,age,name\n007,1.5,"a, b"\n008,2,\n009,3,c\n', ["1.5", "2", "3"]),
        ("SEP=|\nsid|age|name\n007|1.5|a, b\n008|2|\n009|3|c\n", ["1.5", "2", "3"]),
    ],
)
def test_tables_written_by_spreadsheets(tmp_path, text, ages):
    (tmp_path / "t.csv").write_text(text, encoding="utf-8-sig")
    table = read_table(tmp_path / "t.csv")
    assert table["sid"].tolist() == ["007", "008", "009"] and table["age"].tolist() == ages
    assert table["name"].tolist() == ["a, b", "", "c"]


def test_commas_take_precedence_over_semicolons(tmp_path):
    (tmp_path / "t.csv").write_text("sid,note;more\n007,a;b\n")
    assert list(read_table(tmp_path / "t.csv").columns) == ["sid", "note;more"]


def test_names_are_normalised_unicode(tmp_path):
    (tmp_path / "t.csv").write_text("sid,a\nMu\u0308ller,1\n\u200bB2\ufeff,2\n", encoding="utf-8")
    assert read_table(tmp_path / "t.csv")["sid"].tolist() == ["M\u00fcller", "B2"]
