"""Draw docs/shapes.png: ten images of each variant of the embedded data set."""

import sys
from pathlib import Path

import torch

DOCS = Path(__file__).resolve().parent
sys.path.insert(0, str(DOCS.parent))
import common  # noqa: E402

rows = [('standard', k) for k in range(4)] + [(v, 0) for v in common.SHAPE_VARIANTS[1:]]
figure, axes = common.new_figure(len(rows), 10, 9, 0.93 * len(rows) + 0.5)
for (variant, k), row in zip(rows, axes):
    x, info = common.make_shapes(40, 'test', 32, variant)
    for j, axis in enumerate(row):
        common.show_image(
            axis, x[10 * k + j].float() / 255, common.OUTLINES[j] + '\n' + common.TEXTURES[j] if row is axes[0] else ''
        )
    row[0].set_ylabel(variant.replace('_', '\n'), rotation=0, ha='right', va='center')
figure.suptitle(f'shapes, version {common.SHAPES_VERSION}: class k is outline k filled with texture k')
torch.set_num_threads(1)
common.save_figure(figure, DOCS, 'shapes')
(DOCS / 'shapes.pdf').unlink()
