"""`bagscope review` as a user meets it."""

from __future__ import annotations

import csv
import io
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from bagscope import artifacts
from tests.cli.conftest import Ran, files_of, leftovers
from tests.heatmaps.made_run import write_scores
from tests.pipeline.reviewed import label_row, reviewed_run, told, write_predictions

Command = Callable[..., Ran]
IDS = ("Mustermann_1950", "case#0815", "Zebra.77")


def dead_process() -> int:
    with subprocess.Popen([sys.executable, "-c", ""]) as process:
        process.wait()
    return process.pid


def test_a_review_opens_whatever_becomes_of_single_slides(
    bagscope: Command, tmp_path: Path
) -> None:
    run = reviewed_run(tmp_path)
    (tmp_path / "slides" / "b.svs").unlink()
    (tmp_path / "slides" / "c.svs").write_bytes(b"II*\0 no slide")
    # What a killed run leaves: a part that is half done, and a host's name.
    name = f".a.{artifacts.host_name()}~{dead_process()}~01234567.tmp"
    killed = tmp_path / "review" / "abmil" / "slides" / name
    killed.mkdir(parents=True)
    (killed / "thumb.jpg").write_bytes(b"x")
    ran = bagscope("review", run, "--workers", 2, "--max-px", 256)
    assert ran.code == 0, ran.err
    folder = tmp_path / "review" / "abmil"
    assert ran.out.splitlines()[-1] == f"open {folder / 'index.html'}"
    assert "1 of 3 slides with a picture of up to 256 px, 1 µm each" in ran.out
    assert "warning: The slide is not at its path, so there is no picture" in ran.err
    assert artifacts.folder_faults(folder) == []
    assert leftovers(tmp_path) == []
    rows = told(folder / "data" / "cohort.js", "cohort")["slides"]
    assert [row["thumb"] for row in rows] == ["slides/a/thumb.jpg", None, None]
    assert [len(row["notes"]) for row in rows] == [0, 1, 1]
    page = (folder / "index.html").read_text(encoding="utf-8")
    assert '<script src="assets/app.js"></script>' in page
    before = files_of(folder)
    again = bagscope("review", run, "--workers", 2, "--max-px", 256, "--json")
    assert again.code == 0
    assert files_of(folder) == before
    events = [json.loads(line) for line in again.out.splitlines()]
    outcomes = {e["slide_id"]: e["outcome"] for e in events if e["event"] == "slide_finished"}
    # What could not be seen is tried again.
    assert outcomes == {"a": "skipped", "b": "skipped", "c": "done"}
    assert events[-1]["pictures"] == 1
    refused = bagscope("review", run, "--max-px", 512)
    assert refused.code == 2
    assert "max_px is 256, asked for 512" in refused.err
    assert files_of(folder) == before


def test_nothing_in_a_pseudonymised_review_says_who_it_is(
    bagscope: Command, tmp_path: Path
) -> None:
    run = reviewed_run(tmp_path, IDS)
    patients = ("Hildegard_P", "Otto_P", "Ada_P")
    lines = [
        f"{one},slides/{one}.svs,{patient}" for one, patient in zip(IDS, patients, strict=True)
    ]
    (tmp_path / "cohort.csv").write_text("\n".join(["slide_id,path,patient_id", *lines]) + "\n")
    write_predictions(
        run,
        [label_row(one, name, "tumor", 0.9) for one, name in zip(IDS, patients, strict=True)],
    )
    (tmp_path / "slides" / f"{IDS[1]}.svs").write_bytes(b"II*\0 no slide")
    write_scores(run, IDS[2], np.full((12, 1), np.nan))
    table, said = tmp_path / "home" / "table.csv", tmp_path / "said.csv"
    inside = tmp_path / "review" / "abmil-pseudonymised" / "table.csv"
    refused = bagscope("review", run, "--pseudonymise", inside)
    assert (refused.code, inside.exists()) == (2, False)
    assert bagscope("review", run, "--pseudonymise", table, "--dry-run").code == 0
    assert not table.exists()
    said.write_text(
        "slide,verdict,comment,reviewer,run\n"
        f"{IDS[0]},disagree,same as {IDS[2]} of hildegard_p,Ann,abmil\n"
    )
    how = ("--pseudonymise", table, "--workers", 1, "--max-px", 256)
    ran = bagscope("review", run, *how, "--import-verdicts", said)
    assert ran.code == 0, ran.err
    assert "verdicts: 1 added" in ran.out
    assert f"{IDS[1]}.svs" in ran.err  # at home the reason is told in full
    folder = inside.parent
    forbidden = [*IDS, *patients, str(tmp_path), tmp_path.name, ".svs"]
    for name, content in files_of(folder).items():
        for word in forbidden:
            assert word.casefold() not in name.casefold()
            assert word.casefold().encode() not in content.lower(), (name, word)
        # A host's name may be as short as two letters, which a JPEG has by chance.
        assert name.endswith(".jpg") or f"{artifacts.host_name()}~".encode() not in content
    for path in folder.rglob("*.jpg"):
        with Image.open(path) as image:
            assert set(image.info) <= {"jfif", "jfif_version", "jfif_unit", "jfif_density"}
    with table.open(newline="") as handle:
        names = {row["id"]: row["pseudonym"] for row in csv.DictReader(handle)}
    data = told(folder / "data" / "cohort.js", "cohort")
    assert data["pseudonymised"]
    assert [row["key"] for row in data["slides"]] == sorted(names[one] for one in IDS)
    shown = {row["key"]: row for row in data["slides"]}
    assert shown[names[IDS[0]]]["patient"] == names["Hildegard_P"]
    comment = shown[names[IDS[0]]]["verdict"]["comment"]
    assert comment == f"same as {names[IDS[2]]} of {names['Hildegard_P']}"
    # A verdict on a pseudonym comes home.
    said.write_text(
        f"slide;verdict;comment;reviewer;run\r\n{names[IDS[1]]};agree;'=1+1;Bo;abmil\r\n"
    )
    ran = bagscope("review", run, *how, "--import-verdicts", said)
    assert "Bo agrees with the model on 1 of 1 slide." in ran.out
    kept = (tmp_path / "review" / "abmil.verdicts.csv").read_text(encoding="utf-8")
    rows = list(csv.DictReader(io.StringIO(kept)))
    assert [(row["slide"], row["comment"]) for row in rows][1:] == [(IDS[1], "'=1+1")]
    data = told(folder / "data" / "cohort.js", "cohort")
    comments = {row["key"]: row["verdict"]["comment"] for row in data["slides"] if row["verdict"]}
    assert comments[names[IDS[1]]] == "=1+1"


@pytest.mark.slow
def test_shards_make_one_review_and_verdicts_are_checked(bagscope: Command, tmp_path: Path) -> None:
    run = reviewed_run(tmp_path)
    folder = tmp_path / "out"
    how = ("--out", folder, "--max-px", 256, "--workers", 1)
    first = bagscope("review", run, *how, "--shard", "1/2")
    assert first.code == 0
    assert "not complete:" in first.out
    assert not artifacts.is_complete(folder)
    assert bagscope("review", run, *how, "--shard", "2/2").code == 0
    assert artifacts.folder_faults(folder) == []
    # A slide that is no longer of the run leaves the review.
    (run / "scores" / "c.h5").unlink()
    write_predictions(run, [label_row(one, "p", "tumor", 0.9) for one in "ab"])
    said = tmp_path / "said.csv"
    said.write_text("slide,verdict,comment,reviewer\nc,agree,,Ann\na,dunno,,Ann\n")
    refused = bagscope("review", run, *how, "--import-verdicts", said)
    assert refused.code == 2
    assert "row 2, column slide: 'c' is no slide of abmil" in refused.err
    assert "row 3, column verdict: 'dunno' is none of" in refused.err
    assert not (tmp_path / "review").exists()
    said.write_text("slide,verdict,comment,reviewer\na,agree,,Ann\na,unsure,,Bo\n")
    assert bagscope("review", run, *how, "--overwrite", "--import-verdicts", said).code == 0
    rows = told(folder / "data" / "cohort.js", "cohort")["slides"]
    assert [row["key"] for row in rows] == ["a", "b"]
    assert [one["reviewer"] for one in rows[0]["verdicts"]] == ["Ann", "Bo"]
    assert not (folder / "slides" / "c").exists()
    assert artifacts.folder_faults(folder) == []


def test_a_damaged_score_file_is_told_and_all_slides_are_shown(
    bagscope: Command, tmp_path: Path
) -> None:
    run = reviewed_run(tmp_path)
    (run / "scores" / "b.h5").write_bytes(b"no score file")
    ran = bagscope("review", run, "--workers", 1, "--max-px", 256)
    assert ran.code == 1
    assert "No heatmap: " in ran.out and "b.h5" in ran.out
    rows = told(tmp_path / "review" / "abmil" / "data" / "cohort.js", "cohort")["slides"]
    assert [row["slide"] for row in rows] == ["a", "b", "c"], "what was predicted is shown"
