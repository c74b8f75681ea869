"""A review's parts and its table, made in this process."""

from __future__ import annotations

import base64
import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from bagscope import artifacts
from bagscope.cohort.jobs import RunReport
from bagscope.errors import ConfigError, FingerprintMismatch
from bagscope.pipeline.review import PlannedReview, ReviewRequest, ReviewTask, plan_review
from bagscope.pipeline.review_folder import cohort_bytes
from bagscope.pipeline.review_worker import review_task, scored_slide, slide_bytes
from tests.builders import LABEL_RGB, build_svs
from tests.heatmaps.made_run import write_scores
from tests.pipeline.reviewed import LABEL, label_row, reviewed_run, told, write_model
from tests.pipeline.reviewed import write_predictions as write_table


def planned_one(run: Path, **how: object) -> tuple[PlannedReview, ReviewTask]:
    planned = plan_review(dataclasses.replace(ReviewRequest(place=run), **how))  # type: ignore[arg-type]
    return planned, next(iter(planned.tasks.values()))


def notes_of(task: ReviewTask) -> list[str]:
    notes: list[str] = told(task.target / "slide.js", "slide")["notes"]
    assert artifacts.read_json(task.target / "facts.json")["notes"] == notes
    return notes


def test_a_part_holds_places_numbers_and_pictures(tmp_path: Path) -> None:
    run = reviewed_run(tmp_path, ("a",))
    _, task = planned_one(run)
    assert review_task(task).outcome == "done"
    assert artifacts.folder_faults(task.target) == []
    data = told(task.target / "slide.js", "slide")
    assert (data["width_l0"], data["height_l0"], data["mpp"]) == (512, 384, 0.5)
    assert data["picture"]["downsample"] == 1
    coords = np.frombuffer(base64.b64decode(data["tiles"]["coords"]), "<i4").reshape(-1, 2)
    assert coords.tolist() == [[128 * (i % 4), 128 * (i // 4)] for i in range(12)]
    (layer,) = data["layers"]
    assert layer["id"] == data["initial_layer"] == "ratio"
    values = np.frombuffer(base64.b64decode(layer["values"]), "<f4")
    assert values.mean() == pytest.approx(1, rel=1e-6)
    assert len(base64.b64decode(layer["lut"])) == 768
    assert layer["ticks"][0][0] == layer["low"]
    ranked = [tile["tile"] for tile in data["gallery"] if tile["side"] == "top"]
    assert ranked[0] == int(values.argmax())
    for tile in data["gallery"]:
        assert tile["value"] == pytest.approx(float(values[tile["tile"]]), rel=1e-6)
        assert (task.target.parents[1] / tile["image"]).is_file()


def test_each_layer_says_of_itself_whether_it_can_be_believed(tmp_path: Path) -> None:
    run = reviewed_run(tmp_path, ("a",))
    entry = {"score": 0.5, "chance": 0.05, "answer": "probability of tumor", "curves": None}
    judged = [
        {**entry, "basis": "scores", "column": "", "warning": "Attention does not drive it."},
        {**entry, "basis": "contributions", "column": "normal", "warning": ""},
        {**entry, "basis": "contributions", "column": "tumor", "warning": "These do not either."},
    ]
    write_scores(
        run,
        "a",
        np.full((12, 1), -np.log(12)),
        contributions=np.zeros((12, 2), np.float32),
        contribution_bias=np.zeros(2),
        contribution_names=("normal", "tumor"),
        faithfulness={"agreement": None, "forward_passes": None, "judged": judged, "unjudged": ""},
    )
    _, task = planned_one(run)
    assert review_task(task).outcome == "done"
    data = told(task.target / "slide.js", "slide")
    warnings = {layer["id"]: layer["faithfulness"]["warning"] for layer in data["layers"]}
    assert warnings == {
        "ratio": "Attention does not drive it.",
        "contribution-normal": "",
        "contribution-tumor": "These do not either.",
    }
    assert data["faithfulness"]["warning"] == warnings["ratio"]


def test_label_and_macro_are_in_no_picture(tmp_path: Path) -> None:
    run = reviewed_run(tmp_path, ("a",))
    build_svs(
        tmp_path / "slides" / "a.svs",
        width_px=512,
        height_px=384,
        associated=("thumbnail", "label", "macro"),
    )
    _, task = planned_one(run)
    assert review_task(task).warnings == ()
    pictures = list(task.target.rglob("*.jpg"))
    assert len(pictures) > 10
    for path in pictures:
        with Image.open(path) as image:
            colours = np.asarray(image.convert("RGB")).reshape(-1, 3).astype(int)
        assert np.abs(colours - LABEL_RGB).sum(axis=1).min() > 60


def test_a_part_is_kept_unless_its_settings_change(tmp_path: Path) -> None:
    run = reviewed_run(tmp_path, ("a",))
    planned, task = planned_one(run)
    assert review_task(task).outcome == "done"
    assert review_task(task).outcome == "skipped"
    with pytest.raises(FingerprintMismatch, match="max_px is 8192, asked for 300"):
        plan_review(ReviewRequest(place=run, max_px=300))
    _, smaller = planned_one(run, max_px=300, overwrite=True)
    assert review_task(smaller).outcome == "done"
    picture = told(task.target / "slide.js", "slide")["picture"]
    assert (picture["width"], picture["downsample"]) == (256, 2)
    # Other scores are another review.
    write_scores(run, "a", np.full((12, 1), -np.log(12)))
    told_once = r"other scores .*\(1 of 1 slide; .* bagscope review \S+abmil --overwrite$"
    with pytest.raises(FingerprintMismatch, match=told_once):
        plan_review(ReviewRequest(place=run, max_px=300))
    _, changed = planned_one(run, max_px=300, overwrite=True)
    with pytest.raises(FingerprintMismatch, match="scores is"):
        review_task(dataclasses.replace(changed, overwrite=False))
    assert planned.folder == tmp_path / "review" / "abmil"


def test_a_slide_that_is_away_is_told_and_comes_back(tmp_path: Path) -> None:
    run = reviewed_run(tmp_path, ("a",))
    _, task = planned_one(run)
    assert task.slide.path is not None
    away = task.slide.path.with_suffix(".away")
    task.slide.path.rename(away)
    assert review_task(task).warnings == (
        "The slide is not at its path, so there is no picture of it.",
    )
    data = told(task.target / "slide.js", "slide")
    assert data["picture"] is None
    assert len(data["layers"]) == 1
    assert all(tile["image"] is None for tile in data["gallery"])
    away.rename(task.slide.path)
    assert review_task(task).outcome == "done"
    assert notes_of(task) == []
    # Once seen, its picture stays.
    task.slide.path.rename(away)
    assert review_task(task).outcome == "skipped"


@pytest.mark.parametrize(
    ("damage", "note"),
    [
        ("slide", "The slide can't be shown: a.svs"),
        ("size", "The slide can't be shown: a: the slide has 512×384 pixels, its tiles were cut"),
        ("scores", "Its scores can't be read: a.h5: content changed"),
        ("numbers", "Its scores can't be shown: 12 of 12 tiles have scores that are no finite"),
    ],
)
def test_what_is_damaged_is_told_beside_what_is_not(tmp_path: Path, damage: str, note: str) -> None:
    run = reviewed_run(tmp_path, ("a", "b"))
    slide, scores = tmp_path / "slides" / "a.svs", run / "scores" / "a.h5"
    if damage == "slide":
        slide.write_bytes(b"no slide")
    elif damage == "size":
        write_scores(run, "a", np.full((12, 1), -2.5), width_l0=4096)
    elif damage == "scores":
        content = bytearray(scores.read_bytes())
        content[len(content) // 2] ^= 1
        scores.write_bytes(content)
    else:
        write_scores(run, "a", np.full((12, 1), np.nan))
    planned, task = planned_one(run)
    assert review_task(task).outcome == "done"
    (said,) = notes_of(task)
    assert said.startswith(note)
    assert str(tmp_path) not in said
    data = told(task.target / "slide.js", "slide")
    has_picture = damage in ("scores", "numbers")
    assert (data["picture"] is not None) == has_picture
    assert bool(data["layers"]) != has_picture
    review_task(planned.tasks["b"])
    row = told(cohort_bytes(planned), "cohort")["slides"][0]
    assert row["notes"] == [said]
    assert (row["thumb"] is not None) == has_picture
    assert row["predicted"]["label"]["text"] == "tumor"


def test_the_table_says_what_was_said_of_each_slide(tmp_path: Path) -> None:
    run = reviewed_run(tmp_path, ("a", "b#1", "c"))
    lines = [
        {"tone": "finding", "text": "label: AUROC 0.9."},
        {"tone": "warning", "text": "Few patients."},
        {"tone": "note", "text": "Not calibrated."},
    ]
    artifacts.write_json(run / "metrics.json", {"first_lines": {"label": lines}})
    with (tmp_path / "cohort.csv").open("a") as handle:
        handle.write("late,slides/late.svs,patient_9\n")
    planned = plan_review(ReviewRequest(place=run))
    data = told(cohort_bytes(planned, live=True), "cohort")
    assert data["headline"] == ["label: AUROC 0.9."]
    assert data["notes"] == [
        "Few patients.",
        "Not shown for want of a prediction: 1 of the cohort's slides (late).",
    ]
    assert data["targets"] == [{"name": "label", **LABEL["label"], "threshold": 0.5}]
    rows = {row["slide"]: row for row in data["slides"]}
    assert list(rows) == ["a", "b#1", "c"]
    assert rows["b#1"]["thumb"] == "slides/b%231/thumb.jpg"
    assert [row["correct"] for row in rows.values()] == [True, False, False]
    assert [row["fold"] for row in rows.values()] == [0, 1, 2]
    assert [row["patient"] for row in rows.values()] == ["patient_0", "patient_1", "patient_2"]
    assert (rows["a"]["tiles"], rows["a"]["ood"]) == (12, False)
    again = told(cohort_bytes(planned, live=True), "cohort")
    assert again["fingerprint"] == data["fingerprint"]
    write_table(run, [label_row("a", "patient_0", "tumor", 0.1)])
    other = told(cohort_bytes(plan_review(ReviewRequest(place=run)), live=True), "cohort")
    assert other["fingerprint"] != data["fingerprint"]


def test_slides_of_one_patient_share_what_is_said(tmp_path: Path) -> None:
    run = reviewed_run(tmp_path, ("a", "b"))
    (tmp_path / "cohort.csv").write_text(
        "slide_id,path,patient_id\na,slides/a.svs,p\nb,slides/b.svs,p\n"
    )
    case = {"stage": "scores", "case": "p", "slides": {"a": "1", "b": "2"}}
    for slide_id in "ab":
        write_scores(run, slide_id, np.full((12, 1), -np.log(24)), case=case)
    write_table(run, [label_row("p", "p", "normal", 0.7)])
    planned, task = planned_one(run)
    rows = told(cohort_bytes(planned, live=True), "cohort")["slides"]
    assert [(row["patient"], row["correct"]) for row in rows] == [("p", False), ("p", False)]
    (layer,) = told(slide_bytes(task, scored_slide(task), picture=None), "slide")["layers"]
    values = np.frombuffer(base64.b64decode(layer["values"]), "<f4")
    np.testing.assert_allclose(values, 1, rtol=1e-6)


def test_predictions_without_labels_tables_or_a_model(tmp_path: Path) -> None:
    run = reviewed_run(tmp_path, ("a",))
    there = tmp_path / "predictions" / "abmil" / "new"
    there.mkdir(parents=True)
    (run / "scores").rename(there / "scores")
    row = label_row("a", "patient_0", "", 0.7, ood_distance="1.5", ood="1")
    write_table(there, [row])
    artifacts.write_json(there / "predictions.json", {})
    planned = plan_review(ReviewRequest(place=there))
    assert planned.folder == tmp_path / "review" / "abmil.new"
    (found,) = told(cohort_bytes(planned, live=True), "cohort")["slides"]
    assert (found["truth"], found["correct"], found["fold"]) == ({"label": None}, None, None)
    assert found["ood"] is True
    (run / "model.bagscope" / "bundle.json").unlink()
    bare = told(cohort_bytes(plan_review(ReviewRequest(place=there)), live=True), "cohort")
    assert bare["targets"] == [{"name": "label", **LABEL["label"], "threshold": None}]
    (there / "predictions.csv").unlink()
    (none,) = told(cohort_bytes(plan_review(ReviewRequest(place=there)), live=True), "cohort")[
        "slides"
    ]
    assert (none["predicted"], none["tiles"]) == ({}, 12)


def test_labels_and_comments_stay_text(tmp_path: Path) -> None:
    hostile = "</script><img src=x onerror=alert(1)>"
    run = reviewed_run(tmp_path, ("a",))
    row = label_row("a", "p", hostile, 0.7) | {f"label_p_{hostile}": 0.7}
    del row["label_p_tumor"]
    write_table(run, [row | {"label_predicted": hostile}])
    classes = {"label": {"task": "classes", "classes": ["normal", hostile]}}
    write_model(run, classes, {})
    (tmp_path / "review").mkdir()
    (tmp_path / "review" / "abmil.verdicts.csv").write_text(
        f'slide,verdict,comment,reviewer,run\na,agree,"{hostile}",{hostile},abmil\n'
    )
    planned = plan_review(ReviewRequest(place=run))
    content = cohort_bytes(planned, live=True)
    assert not set(b"<>&") & set(content)
    data = told(content, "cohort")
    assert data["targets"][0]["classes"][1] == hostile
    assert data["slides"][0]["predicted"]["label"]["text"] == hostile
    assert data["slides"][0]["verdict"]["comment"] == hostile
    assert data["headline"][-1].startswith(f"{hostile} agrees with the model on 1 of 1")


def test_annotations_are_shown_where_they_are_of_the_slide(tmp_path: Path) -> None:
    run = reviewed_run(tmp_path, ("a", "b"))
    drawn = tmp_path / "drawn"
    drawn.mkdir()
    ring = [[10, 10], [200, 10], [200, 100], [10, 100], [10, 10]]
    hole = [[20, 20], [20, 30], [30, 30], [30, 20], [20, 20]]
    for slide_id, shift in (("a", 0), ("b", 9000)):
        rings = [[[x + shift, y] for x, y in one] for one in (ring, hole)]
        feature = {
            "type": "Feature",
            "geometry": {"type": "Polygon", "coordinates": rings},
            "properties": {"classification": {"name": "Tumor"}},
        }
        (drawn / f"{slide_id}.geojson").write_text(json.dumps(feature))
    planned = plan_review(ReviewRequest(place=run, annotations=drawn))
    first, second = planned.tasks.values()
    assert review_task(first).warnings == ()
    ((found,),) = (told(first.target / "slide.js", "slide")["annotations"],)
    assert found["class"] == "Tumor"
    (polygon,) = found["polygons"]
    assert sorted(map(tuple, polygon[0])) == sorted({tuple(point) for point in ring})
    assert len(polygon) == 2
    (warning,) = review_task(second).warnings
    assert warning.startswith("Its annotation can't be shown: b: every region of b.geojson lies")
    assert told(second.target / "slide.js", "slide")["annotations"] == []
    with pytest.raises(ConfigError, match="has no file of the slides asked about"):
        plan_review(ReviewRequest(place=run, annotations=run))


def test_folders_of_something_else_are_not_touched(tmp_path: Path) -> None:
    run = reviewed_run(tmp_path, ("a",))
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("x")
    # Slides in a folder that is called as a review calls that of its parts.
    data = tmp_path / "data"
    (data / "slides").mkdir(parents=True)
    (data / "slides" / "a.svs").write_text("x")
    (data / "slides" / "b").mkdir()
    for out in (tmp_path / "mine", data, run, tmp_path, run / "scores"):
        with pytest.raises(ConfigError, match="name another --out"):
            plan_review(ReviewRequest(place=run, out=out))
    for how in ({"max_px": 10}, {"quality": 0}):
        with pytest.raises(ConfigError, match="it must be"):
            plan_review(dataclasses.replace(ReviewRequest(place=run), **how))  # type: ignore[arg-type]


def test_a_worker_that_dies_leaves_a_part_without_a_picture(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from bagscope.cohort.jobs import Failure
    from bagscope.pipeline import review_folder

    run = reviewed_run(tmp_path, ("a", "b"))
    planned = plan_review(ReviewRequest(place=run))

    def crashed(planned: PlannedReview, request: ReviewRequest, report: object) -> RunReport:
        review_task(planned.tasks["b"])
        failure = Failure(slide_id="a", error_class="WorkerDied", message="killed by signal 11")
        return RunReport(
            stage="review", total=2, counts={"done": 1, "skipped": 0, "failed": 1},
            failures=(failure,),
        )  # fmt: skip

    monkeypatch.setattr(review_folder, "make_slides", crashed)
    result = review_folder.make_review(planned, ReviewRequest(place=run), object())  # type: ignore[arg-type]
    assert result.exit_code == 1
    assert result.pictures == 1
    assert artifacts.folder_faults(planned.folder) == []
    data = told(planned.folder / "slides" / "a" / "slide.js", "slide")
    assert data["notes"] == ["Its picture could not be made (killed by signal 11)."]
    assert data["picture"] is None
    assert len(data["layers"]) == 1
    # It is tried again.
    assert review_task(planned.tasks["a"]).outcome == "done"
    assert told(planned.folder / "slides" / "a" / "slide.js", "slide")["picture"] is not None


def test_parts_of_other_settings_are_not_taken_for_these(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from bagscope.cohort.jobs import Failure
    from bagscope.pipeline import review_folder

    run = reviewed_run(tmp_path, ("a", "b"))
    failures: tuple[Failure, ...] = ()

    def made(planned: PlannedReview, request: ReviewRequest, report: object) -> RunReport:
        for slide_id in wanted:
            review_task(planned.tasks[slide_id])
        counts = {"done": len(wanted), "skipped": 0, "failed": len(failures)}
        return RunReport(stage="review", total=2, counts=counts, failures=failures)  # type: ignore[arg-type]

    monkeypatch.setattr(review_folder, "make_slides", made)

    def review(**how: object) -> review_folder.ReviewResult:
        request = dataclasses.replace(ReviewRequest(place=run), **how)  # type: ignore[arg-type]
        planned = plan_review(request)
        return review_folder.make_review(planned, request, object())  # type: ignore[arg-type]

    wanted = ("a", "b")
    assert review().index == tmp_path / "review" / "abmil" / "index.html"
    # One of two shards replaces its half: the other half is still of the old settings.
    wanted = ("a",)
    assert review(max_px=256, overwrite=True).missing == 1
    assert not artifacts.is_complete(tmp_path / "review" / "abmil")
    wanted = ("b",)
    assert review(max_px=256, overwrite=True).missing == 0
    # What is refused leaves the review as it was.
    wanted = ()
    failures = (Failure(slide_id="a", error_class="FingerprintMismatch", message="otherwise"),)
    assert review(max_px=256).index is None
    assert artifacts.folder_faults(tmp_path / "review" / "abmil") == []
