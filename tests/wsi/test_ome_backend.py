"""OME-TIFF and OME-Zarr of both versions, against the pixels that were written."""

from __future__ import annotations

import multiprocessing

import numpy as np
import pytest
import tifffile
import zarr

from bagscope.errors import ConfigError, ReadError, UnsupportedSlide
from bagscope.wsi.geometry import plan_read
from bagscope.wsi.ome_backend import scene_count
from bagscope.wsi.opening import open_slide
from tests.builders import field_rgb

FIELD = field_rgb(400, 300)
SIZE = {
    "PhysicalSizeX": 0.5,
    "PhysicalSizeXUnit": "µm",
    "PhysicalSizeY": 0.5,
    "PhysicalSizeYUnit": "µm",
}


def write_ome_tiff(path, images=(FIELD,), names=None, size=SIZE, levels=3):
    with tifffile.TiffWriter(path, ome=True) as writer:
        for i, image in enumerate(images):
            more = {"Name": names[i]} if names else {}
            writer.write(
                image,
                subifds=levels - 1,
                tile=(64, 64),
                photometric="rgb",
                compression="zlib",
                metadata={"axes": "YXS", **size, **more},
            )
            for level in range(1, levels):
                writer.write(
                    image[:: 2**level, :: 2**level],
                    subfiletype=1,
                    tile=(64, 64),
                    photometric="rgb",
                    compression="zlib",
                )


def write_ome_zarr(path, version, image=FIELD, unit="micrometer", axes="cyx", levels=3, scale=0.5):
    group = zarr.open_group(path, mode="w", zarr_format=2 if version == "0.4" else 3)
    kinds = {"t": "time", "c": "channel", "z": "space", "y": "space", "x": "space"}
    described = [
        {"name": a, "type": kinds[a], **({"unit": unit} if unit and a in "zyx" else {})}
        for a in axes
    ]
    datasets = []
    for level in range(levels):
        pixels = image[:: 2**level, :: 2**level]
        ordered = np.moveaxis(pixels, -1, 0)
        if axes == "tczyx":
            ordered = ordered[None, :, None]
        array = group.create_array(
            str(level),
            shape=ordered.shape,
            dtype="uint8",
            chunks=tuple(64 if a in "yx" else n for a, n in zip(axes, ordered.shape, strict=True)),
        )
        array[...] = ordered
        factors = [scale * 2**level if a in "yx" else 1.0 for a in axes]
        datasets.append(
            {
                "path": str(level),
                "coordinateTransformations": [{"type": "scale", "scale": factors}],
            }
        )
    multiscales = [{"name": "slide", "axes": described, "datasets": datasets}]
    if version == "0.4":
        group.attrs["multiscales"] = [{**multiscales[0], "version": "0.4"}]
    else:
        group.attrs["ome"] = {"version": "0.5", "multiscales": multiscales}


def check_whole(path, **options):
    with open_slide(path, **options) as slide:
        info = slide.info
        assert (info.backend, info.width_l0, info.height_l0) == ("ome", 400, 300)
        assert [round(level.downsample) for level in info.levels] == [1, 2, 4]
        assert (info.spacing.mpp, info.spacing.source) == (0.5, "ome.PhysicalSizeX")
        for level in range(3):
            expected = FIELD[:: 2**level, :: 2**level]
            height, width = expected.shape[:2]
            assert np.array_equal(slide.read_level(level, 0, 0, width, height), expected)
        part = slide.read_level(0, 350, 250, 100, 100)
        assert np.array_equal(part[:50, :50], FIELD[250:, 350:])
        assert (part[50:] == 255).all() and (part[:, 50:] == 255).all()
        return info


def test_ome_tiff(tmp_path):
    path = tmp_path / "slide.ome.tif"
    write_ome_tiff(path)
    assert check_whole(path).format == "ome-tiff"


@pytest.mark.parametrize("version", ["0.4", "0.5"])
@pytest.mark.parametrize("axes", ["cyx", "tczyx"])
def test_ome_zarr(tmp_path, version, axes):
    path = tmp_path / "slide.zarr"
    write_ome_zarr(path, version, axes=axes)
    assert check_whole(path).format == "ome-zarr"


@pytest.mark.parametrize(("unit", "scale"), [("nanometer", 500.0), ("millimeter", 0.0005)])
def test_a_zarrs_unit_is_heeded(tmp_path, unit, scale):
    path = tmp_path / "slide.zarr"
    write_ome_zarr(path, "0.5", unit=unit, scale=scale)
    with open_slide(path) as slide:
        assert slide.info.spacing.mpp == pytest.approx(0.5)


def test_a_zarr_without_a_unit_states_no_size(tmp_path):
    path = tmp_path / "slide.zarr"
    write_ome_zarr(path, "0.5", unit=None)
    with open_slide(path) as slide:
        assert slide.info.spacing is None
    with open_slide(path, mpp=0.4) as slide:
        assert slide.info.spacing.mpp == 0.4


def test_a_tiffs_unit_and_planes_of_colour(tmp_path):
    path = tmp_path / "planes.ome.tif"
    metadata = {"axes": "CYX", "PhysicalSizeX": 500, "PhysicalSizeXUnit": "nm"}
    planes = np.moveaxis(FIELD, -1, 0)
    tifffile.imwrite(path, planes, photometric="minisblack", tile=(64, 64), metadata=metadata)
    with open_slide(path) as slide:
        assert slide.info.spacing.mpp == pytest.approx(0.5)
        assert np.array_equal(slide.read_level(0, 10, 20, 100, 80), FIELD[20:100, 10:110])


def test_tiles_are_read_as_by_every_backend(tmp_path):
    path = tmp_path / "slide.ome.tif"
    write_ome_tiff(path)
    corners = np.array([[0, 0], [100, 60], [380, 280]], np.int32)
    with open_slide(path) as slide:
        plan = plan_read([v.downsample for v in slide.info.levels], 0.5, mpp=1.0, tile_px=32)
        batch = slide.read_tiles(corners, plan, threads=2)
    assert plan.level == 1 and batch.readable.all()
    assert np.array_equal(batch.images[1], FIELD[::2, ::2][30:62, 50:82])


def test_scenes_are_chosen_and_labels_are_none_of_them(tmp_path):
    path = tmp_path / "scenes.ome.tif"
    other = 255 - FIELD
    label = np.full((64, 64, 3), 200, np.uint8)
    names = ["first", "label image", "second", "macro image"]
    write_ome_tiff(path, images=(FIELD, label, other, label), names=names, levels=2)
    assert scene_count(path) == 2
    for scene, expected in ((None, FIELD), (0, FIELD), (1, other)):
        with open_slide(path, scene=scene) as slide:
            assert np.array_equal(slide.read_level(0, 0, 0, 400, 300), expected)
            assert slide.info.associated == ("label", "macro")
            with pytest.raises(ReadError, match="never read"):
                slide.read_associated("label")
    with pytest.raises(ConfigError, match="scenes 0 to 1, not 5"):
        open_slide(path, scene=5)


def test_a_collection_of_zarr_images(tmp_path):
    path = tmp_path / "collection.zarr"
    root = zarr.open_group(path, mode="w", zarr_format=2)
    root.attrs["bioformats2raw.layout"] = 3
    write_ome_zarr(path / "0", "0.4")
    write_ome_zarr(path / "1", "0.4", image=255 - FIELD)
    assert scene_count(path) == 2
    with open_slide(path, scene=1) as slide:
        assert np.array_equal(slide.read_level(0, 0, 0, 400, 300), 255 - FIELD)


def test_what_would_need_guessing_is_refused(tmp_path):
    deep, many, stack = (tmp_path / f"{name}.ome.tif" for name in ("deep", "many", "stack"))
    tifffile.imwrite(deep, FIELD.astype(np.uint16), photometric="rgb", metadata={"axes": "YXS"})
    channels = np.zeros((5, 100, 100), np.uint8)
    tifffile.imwrite(many, channels, photometric="minisblack", metadata={"axes": "CYX"})
    tifffile.imwrite(stack, channels, photometric="minisblack", metadata={"axes": "ZYX"})
    for path, words in ((deep, "uint16 pixels"), (many, "5 channels"), (stack, "Z=5")):
        with pytest.raises(UnsupportedSlide, match=f"{path.name}: .*{words}"):
            open_slide(path)


def test_a_plate_is_no_slide(tmp_path):
    path = tmp_path / "plate.zarr"
    zarr.open_group(path, mode="w").attrs["ome"] = {"version": "0.5", "plate": {}}
    with pytest.raises(UnsupportedSlide, match="plate of wells"):
        open_slide(path)


@pytest.mark.parametrize("attributes", [{}, {"ome": {"multiscales": []}}, {"ome": 3}])
def test_a_zarr_without_images_is_refused(tmp_path, attributes):
    path = tmp_path / "empty.zarr"
    zarr.open_group(path, mode="w").attrs.update(attributes)
    with pytest.raises(UnsupportedSlide, match="without an image"):
        open_slide(path)


@pytest.mark.parametrize("kind", ["no axes", "no array", "not json"])
def test_a_damaged_zarr_is_one_sentence(tmp_path, kind):
    path = tmp_path / "damaged.zarr"
    write_ome_zarr(path, "0.5")
    if kind == "not json":
        (path / "zarr.json").write_text("{")
    elif kind == "no array":
        (path / "1" / "zarr.json").unlink()
    else:
        group = zarr.open_group(path, mode="a")
        group.attrs["ome"] = {"multiscales": [{"datasets": []}]}
    with pytest.raises(ReadError, match="Zarr"):
        open_slide(path)


def test_a_damaged_block_is_one_unreadable_tile(tmp_path):
    path = tmp_path / "slide.ome.tif"
    write_ome_tiff(path)
    with tifffile.TiffFile(path) as file:
        offset = file.pages[0].dataoffsets[0]
    with path.open("r+b") as handle:
        handle.seek(offset)
        handle.write(bytes(40))
    corners = np.array([[0, 0], [128, 128]], np.int32)
    plan = plan_read([1.0, 2.0, 4.0], 0.5, mpp=0.5, tile_px=32)
    with open_slide(path) as slide:
        batch = slide.read_tiles(corners, plan)
        assert batch.readable.tolist() == [False, True]
        assert "does not decode" in batch.problems[0]
        assert np.array_equal(batch.images[1], FIELD[128:160, 128:160])


def test_the_objective_and_a_profile_are_facts(tmp_path):
    path = tmp_path / "slide.ome.tif"
    xml = (
        '<OME xmlns="http://www.openmicroscopy.org/Schemas/OME/2016-06"><Instrument '
        'ID="Instrument:0"><Objective ID="Objective:0" NominalMagnification="20"/></Instrument>'
        '<Image ID="Image:0"><ObjectiveSettings ID="Objective:0"/><Pixels ID="Pixels:0" '
        'DimensionOrder="XYCZT" Type="uint8" SizeX="400" SizeY="300" SizeC="3" SizeZ="1" '
        'SizeT="1" Interleaved="true"><Channel ID="Channel:0:0" SamplesPerPixel="3"/>'
        '<TiffData IFD="0" PlaneCount="1"/></Pixels></Image></OME>'
    )
    tifffile.imwrite(
        path,
        FIELD,
        tile=(64, 64),
        photometric="rgb",
        description=xml,
        metadata=None,
        extratags=[(34675, 7, 4, b"icc!", True)],
    )
    with open_slide(path, allow_estimated_mpp=True) as slide:
        assert slide.info.objective == 20
        assert slide.info.properties["icc"] == "present"
        assert (slide.info.spacing.mpp, slide.info.spacing.estimated) == (0.5, True)


def _read_in_child(slide, queue):
    queue.put(slide.read_level(0, 0, 0, 50, 50))


@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
def test_a_slide_that_came_through_a_fork_still_reads(tmp_path):
    path = tmp_path / "slide.ome.tif"
    write_ome_tiff(path)
    context = multiprocessing.get_context("fork")
    with open_slide(path) as slide:
        slide.read_level(0, 0, 0, 10, 10)
        queue = context.Queue()
        child = context.Process(target=_read_in_child, args=(slide, queue))
        child.start()
        assert np.array_equal(queue.get(timeout=30), FIELD[:50, :50])
        child.join(timeout=30)
        assert np.array_equal(slide.read_level(0, 0, 0, 50, 50), FIELD[:50, :50])


def test_closing(tmp_path):
    path = tmp_path / "slide.ome.tif"
    write_ome_tiff(path)
    slide = open_slide(path)
    slide.close()
    slide.close()
    with pytest.raises(ReadError, match="closed"):
        slide.read_level(0, 0, 0, 5, 5)
