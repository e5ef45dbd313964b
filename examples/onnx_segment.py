"""Find an organ of a task without torch: MODEL.onnx TASK ORGAN SCAN X,Y,Z (mm, LPS, amid it) OUT"""

import json
import sys

import numpy as np
import onnxruntime
import SimpleITK as sitk
from safetensors import safe_open

onnx, task, name, scan, point, out = sys.argv[1:]
session = onnxruntime.InferenceSession(onnx, providers=["CPUExecutionProvider"])
about = json.loads(session.get_modelmeta().custom_metadata_map["fastproto"])
with safe_open(task, framework="numpy") as file:
    header = json.loads(file.metadata()["fastproto"])
    index, organ = next((i, o) for i, o in enumerate(header["organs"]) if o["name"] == name)
    rows, ends = file.get_tensor(f"protos.{index}"), file.get_tensor(f"offsets.{index}")
wanted = header["fingerprint"], header["checksum"] if header["adapted_steps"] else about.get("task")
if (about["fingerprint"], about.get("task")) != wanted:
    sys.exit("The ONNX file is of another network; make one with: fastproto export --task TASK")
prep, axes = header["preprocessing"], {"axial": "LPS", "coronal": "LIP", "sagittal": "PIL"}
image = sitk.DICOMOrient(sitk.ReadImage(scan, sitk.sitkFloat32), axes[prep["plane"]])
voxels, size, side = sitk.GetArrayFromImage(image), prep["image_size"], organ["side"]
upper = np.quantile(voxels, 0.995, method="inverted_cdf")
low, high = (-125, 275) if prep["modality"] == "ct" else (voxels.min(), upper)
voxels = voxels.clip(low, high)
mean, std = prep["mean"] or voxels.mean(dtype=float), prep["std"] or voxels.std(dtype=float)
place = image.TransformPhysicalPointToContinuousIndex([float(each) for each in point.split(",")])


def weights(at, count, step):  # linear interpolation as in fastproto/data/geometry.py
    near = np.clip(1 - abs(at[:, None] - np.arange(count)) / max(step, 1), 0, None)
    near *= ((at >= -0.5) & (at <= count - 0.5))[:, None]
    return near / np.maximum(near.sum(1, keepdims=True), 1e-9)


steps, middle = [side / size / each for each in image.GetSpacing()], (size - 1) / 2
there, back = [], []  # from columns, then rows, to those of the network's square; and back
for count, centre, step in zip(voxels.shape[:0:-1], place, steps):  # noqa: B905
    there.append(weights(centre + (np.arange(size) - middle) * step, count, step))
    back.append(weights(middle + (np.arange(count) - centre) / step, size, 1 / step))
slices = np.searchsorted(ends, np.arange(len(rows)), side="right") - 1  # background, organ, ...
bags = [rows[slices % 2 == k] for k in (0, 1)]
lengths = np.array([[len(bag) for bag in bags]])
protos = np.stack([np.resize(bag, (lengths.max(), rows.shape[1])) for bag in bags])[None]
given = {"prototypes": protos.astype("f4"), "lengths": lengths}
for plane in voxels:
    square = (there[1] @ (plane - low) @ there[0].T + low - mean) / std
    chances = session.run(None, given | {"images": square[None, None].astype("f4")})[0][0]
    odds = np.log(chances[1].clip(1e-30)) - np.log(chances[0].clip(1e-30)) + organ["bias"]
    plane[:] = back[1] @ odds @ back[0].T > 0
found = sitk.GetImageFromArray(voxels.astype("u1"))
found.CopyInformation(image)
sitk.WriteImage(found, out)
