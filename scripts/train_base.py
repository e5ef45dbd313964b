# SPDX-License-Identifier: Apache-2.0
"""Train the base model that the package ships, without a label, and export it.

Scans: `ixi_brain_mr`, `openkbp_hn_ct`, `openkbp_hn_ct_more`, `msd_hippocampus_mr` and the two of
`totalseg_examples`; not CHAOS, whose licence does not allow it. The patients of docs/results.md
are left out: IXI034, IXI039, pt_99, pt_83 and the last ten hippocampus cases by name, with the
eleventh, which may be the other side of one of them. Each data set is drawn from as often as any
other. Resumable.

    python scripts/train_base.py --data SCANS --run RUN --minutes 8 --batch 24

The model is written to RUN/base.safetensors; the package's is fastproto/models/base.safetensors.
"""

from __future__ import annotations

from pathlib import Path

import records

from fastproto.data import open_dataset
from fastproto.segmentation import load_model
from fastproto.training import TrainConfig, train

SETS = ("ixi_brain_mr", "openkbp_hn_ct", "openkbp_hn_ct_more", "msd_hippocampus_mr")
SINGLE = ("ct_whole", "mr_small")  # ct_small is a part of ct_whole
TEST_PATIENTS = ("IXI034-HH-1260", "IXI039-HH-1261", "pt_99", "pt_83")
HIPPOCAMPI = 11


def main() -> None:
    """Train, or go on with a run, and export."""
    parser = records.arguments(__doc__, data="folder with the sets named above", run=None)
    parser.add_argument("--minutes", type=float, required=True)
    parser.add_argument("--batch", type=int, default=TrainConfig.batch, help="episodes in a step")
    parser.add_argument("--start", help='model to go on from, e.g. "base"')
    parser.add_argument("--seed", type=int, default=0, help="another one when going on")
    args = parser.parse_args()
    folders = [args.data / name for name in SETS]
    for name in SINGLE:  # plain folders of one scan each: the set mixes CT and MR
        folder = args.run / "scans" / name
        folder.mkdir(parents=True, exist_ok=True)
        link = folder / f"{name}.nii.gz"
        if not link.exists():
            link.symlink_to((args.data / "totalseg_examples" / link.name).resolve())
        folders.append(folder)
    hippocampi = sorted(case.id for case in open_dataset(folders[3]).cases)[-HIPPOCAMPI:]
    config = TrainConfig(
        data=tuple(map(str, folders)),
        output=str(args.run),
        holdout_cases=(*TEST_PATIENTS, *hippocampi),
        label_fraction=0.0,
        encoder="resnet18",
        output_stride=8,
        image_size=128,
        batch=args.batch,
        start=args.start,
        seed=args.seed,
        steps=1_000_000,
        minutes=args.minutes,
    )
    train(config, resume=(args.run / "state.safetensors").exists())
    export(args.run, args.run / "base.safetensors")


def export(run: Path, target: Path) -> None:
    """Half the bytes: weights in float16, which are float32 again when loaded."""
    model = load_model(run)
    extra = {**model.extra, "name": "fastproto base", "licence": "Apache-2.0"}
    model.half().save(target, extra)
    print(f"{target}: {target.stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
