"""Test that damaged and malicious files of every kind raise one of this project's errors."""

import gzip
import io
import json
import pickle
import struct
import subprocess
import sys
import zipfile

import numpy as np
import pytest
import SimpleITK as sitk
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from data.layout import StoreError, load_locations
from data.tables import read_table
from misc.command import UserError
from misc.experiment import Experiment, ExperimentError
from misc.files import load_array
from models.builder import DrasCLR
from models.checkpoint import CheckpointError, add_module_prefix, read_checkpoint, save_checkpoint
from models.cnn3d import Encoder
from preprocess.scan import ScanError, load_scan

from .conftest import ROOT
from .preprocess.phantoms import chest, save, slices

SECONDS = 150  # time limit for a batch of damaged files, which takes 5 to 20 s
BRIEF = settings(
    max_examples=60,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


@pytest.fixture(scope="module")
def intact_files(tmp_path_factory):
    """Write an intact file of each kind, and return the folder."""
    folder = tmp_path_factory.mktemp("sound")
    image = chest()
    for name in ("a.nii", "a.nii.gz", "a.nrrd", "a.mha"):
        sitk.WriteImage(image, str(folder / name))
    sitk.WriteImage(sitk.Cast(image > -500, sitk.sitkUInt8), str(folder / "m.nii"))
    (folder / "d").mkdir()
    save(slices(image), folder / "d")
    for name in ("t.mat", "t.tfm"):
        sitk.WriteTransform(sitk.AffineTransform(3), str(folder / name))
    np.save(folder / "l.npy", np.arange(30).reshape(10, 3))
    (folder / "t.csv").write_text("sid,image\n" + "".join(f"s{i},image/{i}.nii\n" for i in range(20)))
    (folder / "configs.json").write_text(json.dumps({"root_dir": "/x", "epochs": 3, "gamma": [0.5, 4.5]}, indent=2))
    torch.manual_seed(0)
    model = DrasCLR(Encoder, 4, 4, 4, 1, 1, 4, 0.9, 0.2, True)
    save_checkpoint(
        folder / "c.pth.tar", {"epoch": 3, "arch": "x", "state_dict": add_module_prefix(model.state_dict())}
    )
    return folder


KINDS = {
    "a.nii": "image",
    "a.nii.gz": "image",
    "a.nrrd": "image",
    "a.mha": "image",
    "m.nii": "mask",
    "d/IM0003.dcm": "dicom",
    "t.mat": "transform",
    "t.tfm": "transform",
    "l.npy": "locations",
    "t.csv": "table",
    "configs.json": "configs",
    "c.pth.tar": "checkpoint",
}


def read_damaged(intact_files, names, seed, count):
    files = [part for name in names for part in (KINDS[name], intact_files / name)]
    command = [sys.executable, ROOT / "tests" / "fuzz_files.py", seed, count, *files]
    done = subprocess.run([str(part) for part in command], capture_output=True, encoding="utf-8", timeout=SECONDS)
    assert done.returncode == 0, f"ended with {done.returncode} at {done.stderr.splitlines()[-1:]}"
    assert done.stdout == ""


def test_damaged_files(intact_files):
    """One process reads all files and must survive every file."""
    read_damaged(intact_files, [name for name in KINDS if KINDS[name] not in ("dicom", "checkpoint")], seed=1, count=30)


@pytest.mark.slow
@pytest.mark.parametrize("count", [40, 150])
def test_many_damaged_files(intact_files, count):
    slow = [name for name in KINDS if KINDS[name] in ("dicom", "checkpoint")]
    read_damaged(
        intact_files, slow if count == 40 else [name for name in KINDS if name not in slow], seed=2, count=count
    )


# ------------------------------------------------------------ arbitrary bytes


@BRIEF
@given(st.one_of(st.binary(max_size=300), st.text(max_size=200).map(lambda text: ("sid,image\n" + text).encode())))
def test_any_table(tmp_path, content):
    (tmp_path / "t.csv").write_bytes(content)
    try:
        table = read_table(tmp_path / "t.csv")
    except StoreError:
        return
    assert len(table) and all("/" not in sid and sid == sid.strip() for sid in table["sid"])


PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
)


@BRIEF
@given(st.one_of(st.binary(max_size=100), PLAIN.map(lambda value: json.dumps(value).encode())))
def test_any_configuration(tmp_path, content):
    (tmp_path / "configs.json").write_bytes(content)
    try:
        config = Experiment(tmp_path).read_config()
    except ExperimentError:
        return
    assert isinstance(config, dict)


@BRIEF
@given(st.text(max_size=80), st.binary(max_size=64), st.sampled_from([(1, 0), (2, 0), (3, 0), (9, 9)]))
def test_any_array_header(tmp_path, header, data, version):
    text = header.encode()
    length = struct.pack("<H", len(text)) if version == (1, 0) else struct.pack("<I", len(text))
    (tmp_path / "l.npy").write_bytes(b"\x93NUMPY" + bytes(version) + length + text + data)
    with pytest.raises(StoreError):
        load_locations(tmp_path / "l.npy")


@BRIEF
@given(
    st.lists(st.integers(-(2**63), 2**63), max_size=4),
    st.sampled_from(["<i8", ">f4", "|O", "|u1", "<U9", "<c16", "|V0", "[('a', '<i4')]", "nothing"]),
)
def test_any_claimed_array_shape(tmp_path, shape, kind):
    """No memory is allocated for bytes that the header of a .npy file claims but the file does not contain."""
    described = kind if kind.startswith("[") else repr(kind)
    text = f"{{'descr': {described}, 'fortran_order': False, 'shape': {tuple(shape)!r}}}\n".encode()
    path = tmp_path / "a.npy"
    path.write_bytes(b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text + bytes(64))
    try:
        array = load_array(path)
    except ValueError:
        return
    assert array.nbytes <= 64


# ------------------------------------------------------------ malicious files


class Touch:
    """An object that creates a file when it is unpickled."""

    def __init__(self, target):
        self.target = target

    def __reduce__(self):
        import pathlib

        return pathlib.Path.touch, (pathlib.Path(self.target),)


def array_claiming(rows):
    text = f"{{'descr': '<i8', 'fortran_order': False, 'shape': ({rows}, 3)}}\n".encode()
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text + bytes(48)


def test_a_checkpoint_with_code_is_not_executed(tmp_path):
    torch.save({"epoch": 1, "state_dict": {}, "more": Touch(tmp_path / "proof")}, tmp_path / "c.pth.tar")
    (tmp_path / "old.pth.tar").write_bytes(pickle.dumps(Touch(tmp_path / "proof")))
    for name in ("c.pth.tar", "old.pth.tar"):
        with pytest.raises(CheckpointError, match="which are not loaded"):
            read_checkpoint(tmp_path / name)
    assert not (tmp_path / "proof").exists()


def test_a_decompression_bomb_as_checkpoint(tmp_path):
    """torch never compresses a checkpoint, so a file with a strongly compressed record is refused."""
    with zipfile.ZipFile(tmp_path / "c.pth.tar", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("c/data.pkl", b"\x80\x02}q\x00." + bytes(50 << 20))
        archive.writestr("c/version", "3\n")
    with pytest.raises(CheckpointError):
        read_checkpoint(tmp_path / "c.pth.tar")


def test_arrays_with_code_or_a_false_size(tmp_path):
    np.save(tmp_path / "p.npy", np.array([Touch(tmp_path / "proof")], dtype=object), allow_pickle=True)
    (tmp_path / "big.npy").write_bytes(array_claiming(10**15))
    with zipfile.ZipFile(tmp_path / "z.npy", "w") as archive:
        archive.writestr("a.npy", array_claiming(2))
    for name in ("p.npy", "big.npy", "z.npy"):
        with pytest.raises(StoreError, match=r"not a complete .npy file of numbers"):
            load_locations(tmp_path / name)
    assert not (tmp_path / "proof").exists()


def test_a_scan_with_a_false_size(tmp_path):
    stream = io.BytesIO()
    sitk.WriteImage(chest(), str(tmp_path / "a.nii"))
    stream.write((tmp_path / "a.nii").read_bytes())
    head = bytearray(stream.getvalue())
    head[40:48] = struct.pack("<4h", 3, 32000, 32000, 32000)
    (tmp_path / "a.nii").write_bytes(head)
    (tmp_path / "b.nii.gz").write_bytes(gzip.compress(bytes(head)))
    (tmp_path / "c.nrrd").write_bytes(
        b"NRRD0004\ntype: short\ndimension: 3\nsizes: 90000 90000 90000\nencoding: raw\nendian: little\n\n" + bytes(9)
    )
    (tmp_path / "d.mha").write_bytes(
        b"ObjectType = Image\nNDims = 3\nDimSize = 90000 90000 90000\nElementType = MET_SHORT\n"
        b"ElementDataFile = LOCAL\n" + bytes(9)
    )
    for name in ("a.nii", "b.nii.gz", "c.nrrd", "d.mha"):
        with pytest.raises(ScanError, match=r"cut short|cannot be read|claims"):
            load_scan(tmp_path / name)


@pytest.mark.parametrize("name", ["a.mha", "a.mhd", "a.nrrd", "a.nhdr"])
@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("damage", ["cut", "middle", "gone"])
def test_incomplete_voxel_data(tmp_path, name, packed, damage):
    """ITK returns zeros for damaged MetaImages, and allocates whatever size an NRRD header claims."""
    sitk.WriteImage(chest(), str(tmp_path / name), useCompression=packed)
    load_scan(tmp_path / name)
    data = max(tmp_path.iterdir(), key=lambda path: path.stat().st_size)
    content = data.read_bytes()
    if damage == "cut":
        data.write_bytes(content[:-3000])
    elif damage == "middle":
        if not packed:
            pytest.skip("plain voxels have no checksum")
        data.write_bytes(content[:9000] + bytes(200) + content[9200:])
    else:
        if data.name == name:
            pytest.skip("one file")
        data.unlink()
    with pytest.raises(ScanError, match=r"is cut short|is damaged|does not exist"):
        load_scan(tmp_path / name)


def test_sids_that_would_leave_the_folder(tmp_path):
    for sid in ("../../etc/x", "/etc/x", ".hidden", "a\x00b", "a/b", "x" * 400):
        (tmp_path / "t.csv").write_text(f"sid,image\n{sid},b\n")
        with pytest.raises(UserError):
            read_table(tmp_path / "t.csv")


def test_a_deeply_nested_configuration(tmp_path):
    (tmp_path / "configs.json").write_text("[" * 200_000)
    with pytest.raises(ExperimentError, match="cannot be read as an experiment's settings"):
        Experiment(tmp_path).read_config()
