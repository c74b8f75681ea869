"""What follows the features where study.yaml names targets: one training run per encoder."""

from __future__ import annotations

from pathlib import Path

from bagscope.pipeline.study import Study
from bagscope.pipeline.train import TrainRequest
from bagscope.wsi.tiling import tiling_name


def training_requests(study: Study, *, overwrite: bool = False) -> list[TrainRequest]:
    """Return the runs that study.yaml asks for; none where it names no target.

    A run is called as its recipe, with several encoders as recipe and encoder.
    """
    if not study.spec.targets:
        return []
    plan = study.spec.train
    recipe = Path(plan.recipe).stem
    folder = study.folder / "features" / tiling_name(study.spec.tiling)
    encoders = sorted(path.name for path in folder.glob("[!.]*") if path.is_dir())
    return [
        TrainRequest(
            targets=study.spec.targets,
            recipe=plan.recipe,
            settings=plan.options,
            seeds=plan.seeds,
            encoder=encoder,
            name=recipe if len(encoders) == 1 else f"{recipe}_{encoder}",
            overwrite=overwrite,
        )
        for encoder in encoders
    ]
