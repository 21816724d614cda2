"""Read damaged files and files of the wrong type as every kind of input, and check part of each error message."""

import gzip
import io
import json
import pickle
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import SimpleITK as sitk
import torch

from misc.command import UserError
from models.builder import DrasCLR
from models.checkpoint import add_module_prefix
from models.cnn3d import Encoder
from preprocess.subjects import read_subjects

from .fuzz_files import readers
from .preprocess.phantoms import chest, image_of, save, slices

READERS = {**readers(), "subjects": lambda path: [subject.check_image_exists() for subject in read_subjects(path)]}


class Bad(NamedTuple):
    """The kind, name and content of a bad file, and a part of the expected error message."""

    kind: str
    name: str
    content: Callable[[], bytes] | bytes
    says: str


# ------------------------------------------------------------ functions that make files


def written(image: sitk.Image, name: str, folder: Path, compressed: bool = False) -> bytes:
    path = folder / name
    sitk.WriteImage(image, str(path), useCompression=compressed)
    content = path.read_bytes()
    path.unlink()
    return content


def array_of(values: np.ndarray, allow_pickle: bool = False) -> bytes:
    stream = io.BytesIO()
    np.save(stream, values, allow_pickle=allow_pickle)
    return stream.getvalue()


def nifti(**changes: bytes) -> Callable[[Path], bytes]:
    """Make an intact NIfTI file and replace header bytes at the given offsets."""

    def make(folder: Path) -> bytes:
        data = bytearray(written(chest(), "n.nii", folder))
        for offset, value in changes.items():
            at = int(offset[2:])
            data[at : at + len(value)] = value
        return bytes(data)

    return make


def transform_of(transform: sitk.Transform, name: str = "t.tfm") -> Callable[[Path], bytes]:
    def make(folder: Path) -> bytes:
        sitk.WriteTransform(transform, str(folder / name))
        content = (folder / name).read_bytes()
        (folder / name).unlink()
        return content

    return make


def affine(matrix=None, translation=None) -> sitk.Transform:
    made = sitk.AffineTransform(3)
    if matrix is not None:
        made.SetMatrix(matrix)
    if translation is not None:
        made.SetTranslation(translation)
    return made


def checkpoint(**changes) -> Callable[[Path], bytes]:
    """Make an intact checkpoint and replace entries; None removes an entry."""

    def make(folder: Path) -> bytes:
        torch.manual_seed(0)
        model = DrasCLR(Encoder, 4, 4, 4, 1, 1, 4, 0.9, 0.2, True)
        content = {"epoch": 3, "arch": "x", "state_dict": add_module_prefix(model.state_dict())}
        state = changes.get("state")
        for key, value in changes.items():
            if key != "state":
                content[key] = value
        if state:
            state(content["state_dict"])
        stream = io.BytesIO()
        torch.save({key: value for key, value in content.items() if value is not None}, stream)
        return stream.getvalue()

    return make


def cut(make, share: float) -> Callable[[Path], bytes]:
    def shortened(folder: Path) -> bytes:
        content = make(folder)
        return content[: int(len(content) * share)]

    return shortened


def archive(**members: bytes) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as packed:
        for name, content in members.items():
            packed.writestr(name, content)
    return stream.getvalue()


def volume(values) -> Callable[[Path], bytes]:
    return lambda folder: written(image_of(values), "v.nii", folder)


WEIGHT, BIAS = "module.encoder_q.conv1.weight", "module.encoder_q.conv1.bias"
HEX = bytes.fromhex
PNG = HEX("89504e470d0a1a0a0000000d4948445200000001")
SUBJECTS = [
    Bad("subjects", "t.csv", b"", "cannot be read as a CSV table: its first line is empty"),
    Bad("subjects", "t.csv", b"sid,image\n", "has a header but no rows"),
    Bad("subjects", "t.csv", b"name,image\na,b\n", "has no column 'sid'; its columns are name, image"),
    Bad("subjects", "t.csv", b"sid,scan\na,b\n", "has no column 'image'; its columns are sid, scan"),
    Bad("subjects", "t.csv", b"sid,image\na,b\na,c\n", "has sid 'a' more than once"),
    Bad("subjects", "t.csv", b"sid,image\n,b\n", "line 2: sid '' cannot be a file name"),
    Bad("subjects", "t.csv", b"sid,image\na,\n", "the input table has no image for this subject"),
    Bad("subjects", "t.csv", b"sid,image\n../a,b\n", "line 2: sid '../a' cannot be a file name"),
    Bad("subjects", "t.csv", b"sid,image\n/etc/a,b\n", "line 2: sid '/etc/a' cannot be a file name"),
    Bad("subjects", "t.csv", b"sid,image\na,nowhere.nii\n", "does not exist"),
    Bad(
        "subjects",
        "t.csv",
        "sid,image\nä,b\n".encode("latin-1"),
        "is not UTF-8 text; save the table as CSV UTF-8",
    ),
    Bad(
        "subjects",
        "t.csv",
        "sid,image\na,b\n".encode("utf-16"),
        "is not UTF-8 text; save the table as CSV UTF-8",
    ),
    Bad("subjects", "t.csv", b"sid,image\na\x00,b\n", "line 2: sid 'a\\x00' cannot be a file name"),
    Bad("subjects", "t.csv", b'sid,image\n"a,b\n', "cannot be read as a CSV table: unexpected end of data"),
    Bad("subjects", "t.csv", b"sid,sid,image\na,b,c\n", "cannot be read as a CSV table: it has column 'sid' twice"),
    Bad("subjects", "t.csv", PNG, "is not UTF-8 text; save the table as CSV UTF-8"),
]
CONFIGS = [
    Bad("configs", "configs.json", b"", "cannot be read as an experiment's settings"),
    Bad("configs", "configs.json", b"{", "cannot be read as an experiment's settings"),
    Bad("configs", "configs.json", b"[1, 2]", "cannot be read as an experiment's settings"),
    Bad("configs", "configs.json", b"null", "cannot be read as an experiment's settings"),
    Bad("configs", "configs.json", b'{"epochs": 3,}', "cannot be read as an experiment's settings"),
    Bad("configs", "configs.json", '{"epochs": 3}'.encode("utf-16"), "cannot be read as an experiment's settings"),
    Bad("configs", "configs.json", PNG, "cannot be read as an experiment's settings"),
]
LOCATIONS = [
    Bad("locations", "l.npy", b"", "is not a location table: it is not a complete .npy file of numbers"),
    Bad("locations", "l.npy", b"1 2 3\n", "is not a location table: it is not a complete .npy file of numbers"),
    Bad(
        "locations",
        "l.npy",
        array_of(np.zeros((9, 3), int))[:60],
        "is not a location table: it is not a complete .npy file of numbers",
    ),
    Bad(
        "locations",
        "l.npy",
        array_of(np.zeros((9, 3), int))[:-8],
        "is not a location table: it is not a complete .npy file of numbers",
    ),
    Bad(
        "locations",
        "l.npy",
        array_of(np.zeros((9, 2), int)),
        "has shape (9, 2), but a location table must have shape (L, 3)",
    ),
    Bad("locations", "l.npy", array_of(np.zeros(9, int)), "has shape (9,), but a location table must have shape"),
    Bad(
        "locations",
        "l.npy",
        array_of(np.zeros((0, 3), int)),
        "has shape (0, 3), but a location table must have shape (L, 3)",
    ),
    Bad(
        "locations",
        "l.npy",
        array_of(np.full((9, 3), np.nan)),
        "has dtype float64, but locations must be integer atlas voxel indices",
    ),
    Bad(
        "locations",
        "l.npy",
        array_of(np.full((9, 3), np.inf)),
        "has dtype float64, but locations must be integer atlas voxel indices",
    ),
    Bad(
        "locations",
        "l.npy",
        array_of(np.full((9, 3), 0.5)),
        "has dtype float64, but locations must be integer atlas voxel indices",
    ),
    Bad(
        "locations",
        "l.npy",
        array_of(np.full((9, 3), -1)),
        "has negative values, but patch corners are atlas voxel indices, which start at 0",
    ),
    Bad(
        "locations",
        "l.npy",
        array_of(np.full((9, 3), "a")),
        "has dtype <U1, but locations must be integer atlas voxel indices",
    ),
    Bad(
        "locations",
        "l.npy",
        array_of(np.zeros((9, 3), complex)),
        "has dtype complex128, but locations must be integer atlas voxel indices",
    ),
    Bad(
        "locations",
        "l.npy",
        array_of(np.array([[{}] * 3]), True),
        "is not a location table: it is not a complete .npy file of numbers",
    ),
    Bad("locations", "l.npy", archive(a=b"x"), "is not a location table: it is not a complete .npy file of numbers"),
]
TRANSFORMS = [
    Bad("transform", "t.mat", b"", "cannot be read as an ITK transform"),
    Bad("transform", "t.tfm", b"#Insight Transform File V1.0\n", "cannot be read as an ITK transform"),
    Bad("transform", "t.mat", b"1 0 0\n0 1 0\n", "cannot be read as an ITK transform"),
    Bad("transform", "t.mat", cut(transform_of(affine(), "t.mat"), 0.5), "cannot be read as an ITK transform"),
    Bad("transform", "t.tfm", transform_of(sitk.BSplineTransform(3)), "is not a 3-D affine transform"),
    Bad("transform", "t.tfm", transform_of(sitk.AffineTransform(2)), "is not a 3-D affine transform"),
    Bad(
        "transform",
        "t.tfm",
        transform_of(affine(matrix=[0.0] * 9)),
        "scales the volume of the atlas lungs by 0, which is impossible",
    ),
    Bad(
        "transform",
        "t.tfm",
        transform_of(affine(matrix=[1.0, 0, 0, 0, 1, 0, 1, 0, 0])),
        "scales the volume of the atlas lungs by 0, which is impossible",
    ),
    Bad(
        "transform",
        "t.tfm",
        transform_of(affine(translation=[float("nan"), 0, 0])),
        "cannot be read as an ITK transform",
    ),
]
IMAGES = [
    Bad("image", "a.nii", b"", "is empty (0 bytes); copy it again"),
    Bad("image", "a.nii", b"hello", "cannot be read as an image: its content is not NIfTI, NRRD or"),
    Bad("image", "a.nii", PNG, "is a picture (PNG), not a scan"),
    Bad("image", "a.mha", nifti(), "is NIfTI, but ITK cannot recognise this from its name"),
    Bad(
        "image",
        "a.nii",
        nifti(at40=struct.pack("<h", 0)),
        "cannot be read as an image: it has 0 dimensions",
    ),
    Bad(
        "image",
        "a.nii",
        nifti(at42=struct.pack("<h", -5)),
        "cannot be read as an image: it is not recognized as a NIFTI file",
    ),
    Bad("image", "a.nii", nifti(at70=struct.pack("<h", 128)), "has 3 values per voxel, but a CT has one"),
    Bad("image", "a.nii", nifti(at70=struct.pack("<h", 32)), "has complex values; provide a CT in HU"),
    Bad(
        "image",
        "a.nii",
        nifti(at70=struct.pack("<h", 77)),
        "cannot be read as an image: it is not recognized as a NIFTI file",
    ),
    Bad(
        "image",
        "a.nii",
        nifti(at280=struct.pack("<f", float("nan"))),
        "its sform gives voxel positions that are not finite, or an axis of length 0",
    ),
    Bad(
        "image",
        "a.nii",
        nifti(at80=struct.pack("<f", 0.0)),
        "its sform and its qform contradict each other by up to 82.0",
    ),
    Bad("image", "a.nii", cut(nifti(), 0.01), "is cut short: 860 of 86032 bytes"),
    Bad("image", "a.nii", cut(nifti(), 0.6), "is cut short: 51619 of 86032 bytes"),
    Bad(
        "image",
        "a.nii.gz",
        lambda folder: gzip.compress(nifti()(folder))[:-900],
        "is cut short or damaged (Compressed file ended before the end-of-stream",
    ),
    Bad(
        "image",
        "a.nii.gz",
        gzip.compress(b"hello"),
        "cannot be read as an image: its content is not NIfTI, NRRD or",
    ),
    Bad("image", "a.nrrd", b"NRRD0004\n\n", "cannot be read as an image: [nrrd] _nrrdHeaderCheck: didn't see required"),
    Bad("image", "a.mha", b"ObjectType = Image\n", "cannot be read as an image: its content is not NIfTI, NRRD or"),
    Bad("image", "a.nii", volume(np.zeros((20, 20, 20), np.int16)), "has values from 0 to 0: the image is empty"),
    Bad(
        "image",
        "a.nii",
        volume(np.full((20, 20, 20), np.nan, np.float32)),
        "has values from 0 to 0: the image is empty",
    ),
    Bad(
        "image",
        "a.nii",
        volume(np.zeros((1, 20, 20), np.int16)),
        "has size (20, 20, 1), but a volume needs at least 2 voxels along each axis",
    ),
    Bad(
        "image",
        "a.nii",
        volume(np.random.default_rng(0).random((20, 20, 20)).astype(np.float32)),
        "has values from 0.000108007 to 0.999997; these values are not HU",
    ),
    Bad(
        "mask",
        "m.nii",
        volume(np.full((20, 20, 20), -1, np.int16)),
        "has values from -1 to -1, but mask labels must be 0 to 255",
    ),
    Bad("mask", "m.nii", volume(np.full((20, 20, 20), 700, np.int16)), "has values from 700 to 700"),
    Bad("image", "a.dcm", HEX("00" * 128) + b"DICM", "is DICOM, but cut short or damaged"),
    Bad(
        "dicom",
        "d/a.dcm",
        b"hello",
        "copy the folder again, because these DICOM slices are cut short or damaged: a.dcm",
    ),
    Bad(
        "dicom",
        "d/a.dcm",
        HEX("00" * 128) + b"DICM",
        "copy the folder again, because these DICOM slices are cut short or damaged: a.dcm",
    ),
]
CHECKPOINTS = [
    Bad("checkpoint", "c.pth.tar", b"", "cannot be read as a checkpoint: it is empty"),
    Bad("checkpoint", "c.pth.tar", b"hello", "cannot be read as a checkpoint: torch.save did not write this file"),
    Bad(
        "checkpoint", "c.pth.tar", cut(checkpoint(), 0.5), "cannot be read as a checkpoint: it is cut short or damaged"
    ),
    Bad(
        "checkpoint", "c.pth.tar", cut(checkpoint(), 0.99), "cannot be read as a checkpoint: it is cut short or damaged"
    ),
    Bad("checkpoint", "c.pth.tar", archive(a=b"x"), "cannot be read as a checkpoint: it is cut short or damaged"),
    Bad(
        "checkpoint",
        "c.pth.tar",
        pickle.dumps({"epoch": 1}),
        "cannot be read as a checkpoint: it holds objects other than tensors and",
    ),
    Bad("checkpoint", "c.pth.tar", checkpoint(state_dict=None), "has no 'state_dict' and is not a bare state dict"),
    Bad("checkpoint", "c.pth.tar", checkpoint(state_dict={}), "has no key that starts with encoder_q."),
    Bad("checkpoint", "c.pth.tar", checkpoint(state_dict=[1]), "its 'state_dict' is a list, not a mapping of weights"),
    Bad(
        "checkpoint",
        "c.pth.tar",
        checkpoint(state_dict={"a": 1}),
        "its 'state_dict' has an entry 'a' of type int, not a tensor",
    ),
    Bad(
        "checkpoint",
        "c.pth.tar",
        checkpoint(epoch="three"),
        "its 'epoch' is 'three', not a number of finished epochs",
    ),
    Bad("checkpoint", "c.pth.tar", checkpoint(epoch=-1), "its 'epoch' is -1, not a number of finished epochs"),
    Bad(
        "checkpoint",
        "c.pth.tar",
        checkpoint(state=lambda s: s.pop(WEIGHT)),
        "lacks conv1.weight of shape (1, 8, 1, 3, 3, 3)",
    ),
    Bad("checkpoint", "c.pth.tar", checkpoint(state=lambda s: s.pop(BIAS)), "lacks conv1.bias of shape (8,)"),
    Bad(
        "checkpoint",
        "c.pth.tar",
        checkpoint(state=lambda s: s.update({WEIGHT: torch.zeros(2)})),
        "has conv1.weight of shape (2,), but the model needs (1, 8, 1, 3, 3, 3)",
    ),
    Bad(
        "checkpoint",
        "c.pth.tar",
        checkpoint(state=lambda s: s.update({WEIGHT: "w"})),
        "its 'state_dict' has an entry 'module.encoder_q.conv1.weight' of type str",
    ),
    Bad(
        "checkpoint",
        "c.pth.tar",
        checkpoint(state=lambda s: s[WEIGHT].fill_(float("nan"))),
        "has values in conv1.weight that are not finite or exceed 1e+15",
    ),
    Bad("checkpoint", "c.pth.tar", checkpoint(step="two"), "its 'step' is 'two', not a number of finished steps"),
]
FILES = [*SUBJECTS, *CONFIGS, *LOCATIONS, *TRANSFORMS, *IMAGES, *CHECKPOINTS]


@pytest.mark.parametrize(
    "bad", [pytest.param(bad, id=f"{n}-{bad.kind}-{bad.says[:30]}") for n, bad in enumerate(FILES)]
)
@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_error_message_of_a_bad_file(tmp_path, bad):
    content = bad.content(tmp_path) if callable(bad.content) else bad.content
    path = tmp_path / bad.name
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(content)
    with pytest.raises(UserError) as error:
        READERS[bad.kind](path)
    assert bad.says in str(error.value) and "\n" not in str(error.value)


def test_intact_files_are_read(tmp_path):
    assert len(FILES) >= 60
    save(slices(chest()), tmp_path / "d")
    for kind, name, content in (
        ("image", "a.nii", nifti()),
        ("transform", "t.tfm", transform_of(affine())),
        ("transform", "t.tfm", transform_of(sitk.TranslationTransform(3, (1.0, 2.0, 3.0)))),
        ("checkpoint", "c.pth.tar", checkpoint()),
        ("locations", "l.npy", lambda folder: array_of(np.arange(27).reshape(9, 3))),
        ("configs", "configs.json", lambda folder: json.dumps({"epochs": 3}).encode()),
    ):
        (tmp_path / name).write_bytes(content(tmp_path))
        READERS[kind](tmp_path / name)
    READERS["dicom"](tmp_path / "d" / "IM0001.dcm")
