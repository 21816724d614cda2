"""Small noisy chest phantoms, and functions that write them in different encodings."""

import gzip

import numpy as np
import pydicom
import pytest
import SimpleITK as sitk
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import generate_uid

from preprocess.scan import ScanError, read_scan

SPACING, ORIGIN = (3.0, 3.5, 2.5), (-60.5, -55.25, 101.5)


def chest(shape=(30, 34, 42), seed=0, spacing=SPACING):
    """Return int16 HU: air, a body of fat and muscle, and two lungs, each with noise.

    The array's axes are (z, y, x), with LPS orientation.
    """
    rng = np.random.default_rng(seed)
    z, y, x = np.mgrid[tuple(slice(-1, 1, n * 1j) for n in shape)]
    values = rng.normal(-1000, 12, shape)
    body = (x / 0.85) ** 2 + (y / 0.8) ** 2 < 1
    values[body] = rng.normal(-100, 15, body.sum())
    muscle = (x / 0.75) ** 2 + (y / 0.7) ** 2 < 1
    values[muscle] = rng.normal(45, 15, muscle.sum())
    for side in (-1, 1):
        lung = ((x - side * 0.38) / 0.3) ** 2 + (y / 0.5) ** 2 + (z / 0.9) ** 2 < 1
        values[lung] = rng.normal(-860, 50, lung.sum())
    return image_of(np.rint(np.maximum(values, -1024)).astype(np.int16), spacing)


def image_of(values, spacing=SPACING, origin=ORIGIN):
    image = sitk.GetImageFromArray(values)
    image.SetSpacing(spacing)
    image.SetOrigin(origin)
    return image


def array(image):
    return sitk.GetArrayFromImage(image)


def slices(image, study="1.2.3", series="1.2.3.4", **tags):
    """Return one pydicom Dataset per slice: CT, unsigned 16 bit, slope 1, intercept -1024."""
    values, direction = array(image), np.array(image.GetDirection()).reshape(3, 3)
    made = []
    for k, plane in enumerate(values):
        d = Dataset()
        d.file_meta = FileMetaDataset()
        d.file_meta.TransferSyntaxUID = pydicom.uid.ExplicitVRLittleEndian
        d.file_meta.MediaStorageSOPClassUID = d.SOPClassUID = "1.2.840.10008.5.1.4.1.1.2"
        d.file_meta.MediaStorageSOPInstanceUID = d.SOPInstanceUID = generate_uid()
        d.Modality, d.PatientID, d.PatientName = "CT", "x", "x"
        d.StudyInstanceUID, d.SeriesInstanceUID = study, series
        d.InstanceNumber, d.SeriesNumber, d.ImageType = k + 1, 1, ["ORIGINAL", "PRIMARY", "AXIAL"]
        place(d, image.TransformIndexToPhysicalPoint((0, 0, k)))
        d.ImageOrientationPatient = [f"{v:g}" for v in (*direction[:, 0], *direction[:, 1])]
        d.PixelSpacing = [f"{image.GetSpacing()[1]:g}", f"{image.GetSpacing()[0]:g}"]
        d.SliceThickness = f"{image.GetSpacing()[2]:g}"
        d.Rows, d.Columns = plane.shape
        d.SamplesPerPixel, d.PhotometricInterpretation = 1, "MONOCHROME2"
        d.BitsAllocated, d.BitsStored, d.HighBit, d.PixelRepresentation = 16, 16, 15, 0
        d.RescaleSlope, d.RescaleIntercept, d.RescaleType = "1", "-1024", "HU"
        store(d, plane)
        for name, value in tags.items():
            setattr(d, name, value)
        made.append(d)
    return made


def place(dataset, point):
    dataset.ImagePositionPatient = [f"{v:.4f}" for v in point]


def moved(dataset, *by):
    place(dataset, np.array(dataset.ImagePositionPatient, dtype=float) + by)


def store(dataset, plane, intercept=-1024, dtype="<u2"):
    """Store HU values in a slice's pixels."""
    dataset.PixelData = (np.asarray(plane).astype(int) - intercept).astype(dtype).tobytes()


def save(datasets, folder, name="IM{:04d}.dcm".format, **how):
    folder.mkdir(parents=True, exist_ok=True)
    for k, d in enumerate(datasets):
        d.save_as(folder / name(k), enforce_file_format=True, **how)
    return folder


def enhanced(image, order=None, **tags):
    """Return one Enhanced CT Dataset with all slices; the frames may be in any order."""
    one, values = slices(image)[0], array(image)
    order = range(len(values)) if order is None else order

    def sequence(**items):
        item = Dataset()
        for name, value in items.items():
            setattr(item, name, value)
        return pydicom.Sequence([item])

    d = Dataset()
    d.file_meta = one.file_meta
    d.file_meta.MediaStorageSOPClassUID = d.SOPClassUID = "1.2.840.10008.5.1.4.1.1.2.1"
    d.file_meta.MediaStorageSOPInstanceUID = d.SOPInstanceUID = generate_uid()
    for element in one:
        if element.keyword.startswith(
            ("Modality", "Patient", "Series", "Study", "Rows", "Col", "Sam", "Photo", "Bits")
        ):
            d.add(element)
    d.HighBit, d.PixelRepresentation = 15, 0
    d.InstanceNumber, d.NumberOfFrames, d.ImageType = 1, len(values), ["ORIGINAL", "PRIMARY", "VOLUME", "NONE"]
    shared = Dataset()
    shared.PixelMeasuresSequence = sequence(PixelSpacing=one.PixelSpacing, SliceThickness="2.5")
    shared.PlaneOrientationSequence = sequence(ImageOrientationPatient=one.ImageOrientationPatient)
    shared.PixelValueTransformationSequence = sequence(RescaleSlope="1", RescaleIntercept="-1024", RescaleType="HU")
    d.SharedFunctionalGroupsSequence = pydicom.Sequence([shared])
    frames = []
    for number, k in enumerate(order):
        frame = Dataset()
        point = [f"{v:.4f}" for v in image.TransformIndexToPhysicalPoint((0, 0, int(k)))]
        frame.PlanePositionSequence = sequence(ImagePositionPatient=point)
        frame.FrameContentSequence = sequence(StackID="1", InStackPositionNumber=number + 1)
        frames.append(frame)
    d.PerFrameFunctionalGroupsSequence = pydicom.Sequence(frames)
    d.PixelData = (values[list(order)].astype(int) + 1024).astype("<u2").tobytes()
    for name, value in tags.items():
        setattr(d, name, value)
    return d


NIFTI = {"dim": (40, "<i2"), "xyzt_units": (123, "u1"), "qform_code": (252, "<i2"), "sform_code": (254, "<i2"),
         "pixdim": (76, "<f4"), "scl": (112, "<f4"), "quaternion": (256, "<f4"), "srow": (280, "<f4")}  # fmt: skip


def nifti(image, path, **fields):
    """Write a NIfTI file and overwrite fields of its header."""
    packed = path.name.endswith(".gz")
    plain = path.with_name(path.name.removesuffix(".gz"))
    sitk.WriteImage(image, str(plain))
    content = bytearray(plain.read_bytes())
    for name, value in fields.items():
        offset, kind = NIFTI[name]
        content[offset : offset + np.asarray(value, kind).nbytes] = np.asarray(value, kind).tobytes()
    if packed:
        plain.unlink()
    path.write_bytes(gzip.compress(bytes(content)) if packed else bytes(content))
    return path


def sform_of(image):
    """Return the image's sform as a (3, 4) array in RAS."""
    axes = np.array(image.GetDirection()).reshape(3, 3) * image.GetSpacing()
    return np.diag([-1.0, -1.0, 1.0]) @ np.column_stack([axes, image.GetOrigin()])


def refused(path, *words):
    """Check that a scan is refused with one line that contains its file name and ``words``; return this line."""
    with pytest.raises(ScanError) as caught:
        read_scan(path)
    message = str(caught.value)
    assert "\n" not in message and path.name in message
    for word in words:
        assert word in message, message
    return message
