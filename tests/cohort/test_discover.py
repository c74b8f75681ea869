from __future__ import annotations

from pathlib import Path

import pytest

from bagscope.cohort.table import load_cohort
from bagscope.errors import CohortError


def make(folder: Path, *names: str) -> None:
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()


def found(source: Path | str) -> dict[str, str]:
    return {row.slide_id: row.path.name for row in load_cohort(source).rows}


def test_a_folder_becomes_a_cohort(tmp_path):
    make(
        tmp_path,
        "b.SVS",
        "a.svs",
        "sub/c.ome.tiff",
        "sub/d.ome.tif",
        "e.ndpi",
        "e2.v1.tif",
        "readme.txt",
        ".hidden.svs",
        ".cache/f.svs",
        "g.mrxs",
        "g/Slidedat.ini",
        "g/Data0001.dat",
        "g/preview.tif",
        "h.ome.zarr/0/c/0/0",
        "h.ome.zarr/inner.svs",
        "results.zarr/inner.svs",
        "series/1.dcm",
        "series/2.dcm",
    )
    assert found(tmp_path) == {
        "a": "a.svs",
        "b": "b.SVS",
        "e": "e.ndpi",
        "e2.v1": "e2.v1.tif",
        "g": "g.mrxs",
        "h": "h.ome.zarr",
        "series": "series",
        "c": "c.ome.tiff",
        "d": "d.ome.tif",
    }
    assert all(row.path.is_absolute() for row in load_cohort(tmp_path).rows)


def test_the_same_stem_twice_is_refused_with_both_named(tmp_path):
    make(tmp_path, "one/a.svs", "two/A.tif")
    with pytest.raises(CohortError) as caught:
        load_cohort(tmp_path)
    assert "one/a.svs" in str(caught.value)
    assert "two/A.tif" in str(caught.value)


def test_a_name_that_can_be_no_id_is_refused(tmp_path):
    make(tmp_path, "a?.svs")
    with pytest.raises(CohortError, match=r"a\?\.svs: its name can't be a slide id"):
        load_cohort(tmp_path)


def test_images_count_only_where_there_is_nothing_else(tmp_path):
    make(tmp_path, "a.png", "b.jpg")
    assert found(tmp_path) == {"a": "a.png", "b": "b.jpg"}
    make(tmp_path, "c.svs")
    cohort = load_cohort(tmp_path)
    assert [row.slide_id for row in cohort.rows] == ["c"]
    assert "left out 2 PNG and JPEG files" in cohort.notes[0]
    assert found(f"{tmp_path}/*.png") == {"a": "a.png"}


def test_companions_of_a_hamamatsu_vms_are_no_slides(tmp_path):
    make(tmp_path, "a.vms", "a_0.jpg", "a_1.jpg")
    cohort = load_cohort(tmp_path)
    assert [row.slide_id for row in cohort.rows] == ["a"]
    assert cohort.notes == ()


def test_globs(tmp_path):
    make(tmp_path, "x/a.svs", "y/b.svs", "y/c.txt", "z/1.dcm", "z/2.dcm", "m.mrxs", "m/d.tif")
    assert found(f"{tmp_path}/*/*") == {"a": "a.svs", "b": "b.svs", "z": "z"}
    assert found(f"{tmp_path}/**/*.svs") == {"a": "a.svs", "b": "b.svs"}
    assert found(f"{tmp_path}/[xz]") == {"z": "z"}
    with pytest.raises(CohortError, match=r"matches no slide \(1 other"):
        load_cohort(f"{tmp_path}/y/*.txt")


def test_one_slide_is_a_cohort(tmp_path):
    make(tmp_path, "a.svs")
    assert found(tmp_path / "a.svs") == {"a": "a.svs"}


def test_links_that_lead_back_are_followed_once(tmp_path):
    make(tmp_path, "a.svs", "sub/b.svs")
    (tmp_path / "sub" / "up").symlink_to(tmp_path)
    (tmp_path / "elsewhere").symlink_to(tmp_path / "sub")
    assert found(tmp_path) == {"a": "a.svs", "b": "b.svs"}


def test_an_empty_folder_says_what_was_looked_for(tmp_path):
    make(tmp_path, "a.txt")
    with pytest.raises(CohortError, match=r"no slide.*\.svs"):
        load_cohort(tmp_path)
