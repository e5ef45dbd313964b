# SPDX-License-Identifier: Apache-2.0
"""The organs of a synthetic patient: which tissue every voxel is, and what tissues look like.

A patient is an abdomen built from ellipsoids in coordinates of its own body (u to the left, v to
the back, w to the head, each about -1..1), which are tilted and smoothly warped.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from scipy.spatial.transform import Rotation

ORGANS: dict[int, str] = {
    1: "liver",
    2: "spleen",
    3: "right kidney",
    4: "left kidney",
    5: "spine",
    6: "aorta",
    7: "stomach",
    8: "lungs",
    9: "gallbladder",
    10: "psoas muscles",
}


class Tissue(NamedTuple):
    """Mean and spread from patient to patient, in HU and in MR units, and texture in parts of 1."""

    ct: float
    ct_spread: float
    mr: float
    mr_spread: float
    texture: float


# HU as in a portal venous phase; MR as in a T2-weighted turbo spin echo (flowing blood is dark).
TISSUES: dict[str, Tissue] = {
    "air": Tissue(-1000, 0, 0, 0, 0.0),
    "fat": Tissue(-100, 8, 255, 30, 0.5),
    "muscle": Tissue(58, 6, 150, 15, 0.6),
    "rib": Tissue(420, 60, 180, 25, 1.0),
    "heart": Tissue(130, 20, 120, 25, 0.4),
    "cava": Tissue(125, 20, 75, 30, 0.2),
    "canal": Tissue(25, 8, 720, 60, 0.3),
    "disc": Tissue(90, 12, 300, 60, 0.6),
    "sinus": Tissue(-60, 25, 420, 50, 0.8),
    "bowel wall": Tissue(80, 12, 210, 25, 0.4),
    "bowel": Tissue(35, 25, 380, 90, 1.2),
    "gas": Tissue(-850, 40, 25, 10, 0.2),
    "stomach gas": Tissue(-850, 40, 25, 10, 0.2),
    "liver": Tissue(105, 12, 205, 25, 0.5),
    "spleen": Tissue(118, 12, 375, 40, 0.4),
    "right kidney": Tissue(165, 20, 420, 35, 0.9),
    "left kidney": Tissue(165, 20, 420, 35, 0.9),
    "spine": Tissue(240, 40, 230, 30, 1.6),
    "aorta": Tissue(155, 22, 55, 25, 0.2),
    "stomach": Tissue(45, 20, 430, 110, 1.0),
    "lungs": Tissue(-820, 30, 35, 12, 0.9),
    "gallbladder": Tissue(12, 6, 650, 60, 0.2),
    "psoas muscles": Tissue(62, 6, 145, 15, 0.6),
}
TISSUE_INDEX = {name: index for index, name in enumerate(TISSUES)}
_LABELS = {organ: label for label, organ in ORGANS.items()}
_LABELS |= {"disc": _LABELS["spine"], "stomach gas": _LABELS["stomach"]}
LABEL_OF_TISSUE = np.array([_LABELS.get(name, 0) for name in TISSUES], dtype=np.uint8)


def anatomy(
    rng: np.random.Generator, size: np.ndarray, spacing: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Paint one body.

    Returns:
        Tissue index per voxel (uint8 [Z, Y, X]) and the relative texture per voxel (float32).
    """
    u, v, w = _body_coordinates(rng, size, spacing)
    tissue = np.zeros(size, dtype=np.uint8)

    def vary(value: float, spread: float) -> float:
        return float(value + rng.uniform(-spread, spread))

    def blob(
        centre: tuple[float, float, float], radii: tuple[float, float, float], *, lean: float = 0.0
    ) -> np.ndarray:
        """1 at the centre, 0 on the surface; place and size vary, the surface is wavy."""
        cu, cv, cw = (vary(c, 0.035) for c in centre)
        ru, rv, rw = (r * vary(1.0, 0.14) for r in radii)
        along = w - cw
        field = (u - cu - lean * along) / ru
        field *= field
        field += ((v - cv) / rv) ** 2
        field += (along / rw) ** 2
        np.subtract(1, np.sqrt(field, out=field), out=field)
        waves = [
            np.sin(vary(2.2, 0.8) * np.pi * np.linspace(-1, 1, n, dtype=np.float32) + vary(0, 3.1))
            for n in size
        ]
        field += 0.10 * waves[0][:, None, None] * waves[1][:, None] * waves[2]
        return field

    def paint(name: str, where: np.ndarray) -> None:
        tissue[where] = TISSUE_INDEX[name]

    radius = (np.abs(u) ** 2.3 + np.abs(v) ** 2.3) ** (1 / 2.3)
    outer = 1 - vary(0.15, 0.08)  # the ring outside is subcutaneous fat
    inner = outer - vary(0.085, 0.02)
    cavity = radius < inner
    paint("fat", radius < 1)
    paint("muscle", (radius < outer) & ~cavity)
    ribs = np.sin(vary(17, 2) * (w - 0.35 * v) + vary(0, 3)) > 0.55
    paint("rib", (np.abs(radius - (inner + outer) / 2) < 0.028) & ribs & (w > -0.25))

    for _ in range(rng.integers(14, 23)):
        loop = blob((vary(0, 0.6), vary(-0.18, 0.36), vary(-0.6, 0.45)), (0.17, 0.2, 0.22))
        paint("bowel wall", (loop > 0) & cavity)
        paint("bowel", (loop > 0.16) & cavity)
        if rng.random() < 0.3:
            top = vary(-0.3, 0.2)
            paint("gas", (loop > 0.2) & (v < top) & cavity)

    spine_u, spine_v = vary(0, 0.02), vary(0.45, 0.02)
    for side in (-1, 1):
        back = blob((side * 0.2 + spine_u, spine_v + 0.3, 0.0), (0.2, 0.15, 3.0))
        paint("muscle", (back > 0) & (radius < outer))
        width = np.clip(0.5 - 0.6 * w, 0.0, 1.0)  # tapers off towards the diaphragm
        psoas = blob((side * 0.21 + spine_u, spine_v + 0.02, -0.6), (0.1, 0.15, 1.05))
        paint("psoas muscles", (psoas > 0.35 * (1 - width)) & (w < 0.15) & cavity)
    body = blob((spine_u, spine_v, 0.0), (0.135, 0.19, 6.0))
    process = blob((spine_u, spine_v + 0.27, 0.0), (0.05, 0.19, 6.0))
    wings = blob((spine_u, spine_v + 0.17, 0.0), (0.24, 0.05, 6.0))
    levels = np.sin(vary(20, 2) * w + vary(0, 3))
    bone = (body > 0) | (process > 0) | ((wings > 0) & (levels > -0.1))
    paint("spine", bone & (radius < outer))
    paint("disc", (body > 0) & (levels < -0.8))
    paint("canal", blob((spine_u, spine_v + 0.19, 0.0), (0.06, 0.065, 6.0)) > 0)

    dome = vary(0.72, 0.06) - 0.55 * np.clip(radius / inner, 0, 1) ** 3 - 0.25 * v
    lungs = (w > dome) & (radius < inner - 0.02) & (np.abs(u) > 0.14)
    paint("lungs", lungs & ~bone & (tissue != TISSUE_INDEX["muscle"]))
    paint("heart", (blob((0.16, -0.32, 1.05), (0.45, 0.42, 0.32)) > 0) & cavity)

    abdomen = radius < inner - 0.015
    right_lobe = blob((-0.44, -0.08, 0.34), (0.44, 0.62, 0.56), lean=-0.1)
    left_lobe = blob((-0.02, -0.42, 0.45), (0.46, 0.3, 0.3), lean=0.25)
    fissure = w > vary(-0.25, 0.1) + 0.45 * u + 0.25 * v - 0.15
    paint("liver", (np.maximum(right_lobe, left_lobe) > 0) & fissure & abdomen & ~bone)
    fundus = blob((0.38, -0.12, 0.42), (0.27, 0.34, 0.3), lean=0.2)
    antrum = blob((0.12, -0.4, 0.1), (0.36, 0.19, 0.17), lean=-0.3)
    stomach = np.maximum(fundus, antrum)
    paint("stomach", (stomach > 0) & abdomen)
    if rng.random() < 0.6:
        paint("stomach gas", (stomach > 0.3) & (v < vary(-0.42, 0.08)))
    spleen = blob((0.62, 0.25, 0.4), (0.23, 0.36, 0.34), lean=-0.1)
    paint("spleen", (spleen > 0) & (stomach < -0.02) & abdomen)
    paint("gallbladder", (blob((-0.3, -0.4, 0.0), (0.12, 0.17, 0.2)) > 0) & abdomen)

    kidney_fields = []
    for side, name, height in ((-1, "right kidney", -0.18), (1, "left kidney", -0.06)):
        centre = (side * 0.43, 0.36, height)
        kidney = blob(centre, (0.18, 0.25, 0.42), lean=-side * 0.12)
        hilum = blob((side * 0.29, 0.3, height), (0.11, 0.11, 0.16), lean=-side * 0.12)
        inside = (kidney > 0) & (radius < inner - 0.01) & (body < -0.1)
        paint(name, inside & (hilum < 0))
        paint("sinus", inside & (hilum >= 0))
        kidney_fields.append(kidney)
    vessel = (0.065, 0.09, 6.0)
    paint("cava", (blob((-0.12 + spine_u, spine_v - 0.24, 0.0), vessel) > 0) & (w < 0.75))
    paint("aorta", blob((0.06 + spine_u, spine_v - 0.25, 0.0), vessel, lean=0.02) > 0)

    # The cortex of a kidney takes up more contrast than the medulla, the edge of a bone is denser.
    light = np.zeros(size, dtype=np.float32)
    cortex = np.maximum(*kidney_fields)
    light[(cortex > 0) & (cortex < 0.3)] = 1.5
    light[(cortex >= 0.3)] = -1.5
    light[(body > 0) & (body < 0.18)] = 2.5
    return tissue, light


def _body_coordinates(
    rng: np.random.Generator, size: np.ndarray, spacing: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Coordinates (u, v, w) of every voxel, float32 [Z, Y, X]: off centre, tilted and warped."""
    axes = [
        (np.arange(n, dtype=np.float32) - (n - 1) / 2) * step + rng.uniform(-8, 8)
        for n, step in zip(size, spacing, strict=True)
    ]
    z, y, x = np.meshgrid(*axes, indexing="ij", sparse=True)
    tilt = Rotation.from_euler("xyz", rng.uniform(-4, 4, 3), degrees=True).as_matrix()
    half_axes = np.array([150, 108, 115]) * rng.uniform(0.91, 1.09, 3)  # mm, along u, v, w
    coordinates = []
    for row, half_axis in zip(tilt, half_axes, strict=True):
        coordinate = np.zeros(size, dtype=np.float32)
        for factor, axis in zip(row, (x, y, z), strict=True):
            coordinate += np.float32(factor) * axis
        for _ in range(3):
            # A sine in every direction, with wavelengths of 150 to 400 mm.
            waves = [np.sin(2 * np.pi * (a / rng.uniform(150, 400) + rng.random())) for a in axes]
            amplitude = np.float32(rng.uniform(3, 8))
            coordinate += amplitude * waves[0][:, None, None] * waves[1][:, None] * waves[2]
        coordinates.append(coordinate / np.float32(half_axis))
    return coordinates[0], coordinates[1], coordinates[2]
