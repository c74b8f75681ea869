"""What follows the features where study.yaml names targets: one training run per encoder."""

from __future__ import annotations

from pathlib import Path

from bagscope.pipeline.study import Study
from bagscope.pipeline.train import TrainRequest


def training_requests(study: Study, *, overwrite: bool = False) -> list[TrainRequest]:
    """Return the runs that study.yaml asks for; none where it names no target.

    A run is called as its recipe, with several encoders as recipe and encoder.
    """
    if not study.spec.targets:
        return []
    plan = study.spec.train
    recipe = Path(plan.recipe).stem
    encoders = study.extracted_encoders()
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
