// The zoomable slide with its heatmap.
//
// Frames: `_l0` (level-0 pixels); OpenSeadragon's viewport, whose unit is the slide's width at
// level 0; device pixels of the canvases. Zoom is CSS pixels per level-0 pixel.
(function (bagscope) {
  "use strict";

  const { byId, announce } = bagscope;
  const BLANK = "data:image/gif;base64,R0lGODlhAQABAIAAAP///wAAACH5BAAAAAAALAAAAAABAAEAAAICRAEAOw==";
  const LONGEST_BAR_PX = 140;
  const OVERZOOM = 4;

  let viewer = null;
  let overlay = null;
  let minimap = null;
  let slide = null;
  let map = null;
  let layer = null;
  let values = null;
  let opacity = 0.45;
  let isHeatShown = true;
  let isReady = false;
  let whenMoved = () => {};
  const decoded = new Map();

  const at = (x_l0, y_l0) => new OpenSeadragon.Point(x_l0 / slide.width_l0, y_l0 / slide.width_l0);
  const cssZoom = () => (viewer.viewport.getZoom(true) * viewer.viewport.getContainerSize().x) / slide.width_l0;

  function startViewer(onMoved) {
    whenMoved = onMoved;
    const seconds = bagscope.isCalm() ? 0 : 0.35;
    keepStyleSheetOut();
    viewer = OpenSeadragon({
      element: byId("viewport"),
      drawer: "canvas",
      showNavigationControl: false,
      showNavigator: false,
      animationTime: seconds,
      zoomPerScroll: 1.25,
      visibilityRatio: 0.2,
      minZoomImageRatio: 0.6,
      maxZoomPixelRatio: OVERZOOM,
      // Drawing through a sketch would shift the picture by parts of a pixel.
      smoothTileEdgesMinZoom: Infinity,
      gestureSettingsMouse: { clickToZoom: false, dblClickToZoom: true },
      gestureSettingsTouch: { flickEnabled: !bagscope.isCalm() },
    });
    viewer.addHandler("canvas-key", (event) => (event.preventDefaultAction = true));
    overlay = new bagscope.Overlay(viewer.canvas, toDevice, deviceSize);
    minimap = new bagscope.Minimap(byId("minimap"), (x, y) => viewer.viewport.panTo(at(x, y)));
    viewer.canvas.setAttribute("role", "group");
    viewer.canvas.setAttribute("aria-label", "The slide: arrow keys move, plus and minus zoom, r rotates");
    viewer.addHandler("update-viewport", redraw);
    viewer.addHandler("animation-finish", () => whenMoved());
    viewer.addHandler("canvas-click", (event) => event.quick && markAt(event.position));
    viewer.canvas.addEventListener("pointermove", (event) => readAt(event));
    viewer.canvas.addEventListener("pointerleave", () => readOut(null));
    bindTools();
  }

  /** OpenSeadragon adds a sheet unless it finds one; the page's policy allows none in the page. */
  function keepStyleSheetOut() {
    const standIn = document.createElementNS("urn:none", "style");
    standIn.setAttribute("data-openseadragon-mobile-css", "none");
    document.head.append(standIn);
  }

  function bindTools() {
    const click = (id, work) => byId(id).addEventListener("click", work);
    click("zoom-in", () => zoomBy(1.6));
    click("zoom-out", () => zoomBy(1 / 1.6));
    click("zoom-fit", fit);
    click("rotate", () => rotate(90));
    click("toggle-heatmap", () => showHeat(!isHeatShown));
    click("toggle-annotations", toggleOutlines);
    click("marked-close", () => mark(null));
    byId("opacity").addEventListener("input", (event) => setOpacity(event.target.value / 100));
  }

  function deviceSize() {
    const size = viewer.viewport.getContainerSize();
    const ratio = OpenSeadragon.pixelDensityRatio;
    return [Math.round(size.x * ratio), Math.round(size.y * ratio)];
  }

  /** The affine map from level-0 to device pixels, from where the viewport puts three points. */
  function toDevice() {
    const ratio = OpenSeadragon.pixelDensityRatio;
    const [zero, right, below] = [[0, 0], [slide.width_l0, 0], [0, slide.width_l0]].map(([x, y]) =>
      viewer.viewport.pixelFromPoint(at(x, y), true).times(ratio));
    const unit = slide.width_l0;
    return [
      (right.x - zero.x) / unit, (right.y - zero.y) / unit,
      (below.x - zero.x) / unit, (below.y - zero.y) / unit,
      zero.x, zero.y,
    ];
  }

  function fromElement(position) {
    const point = viewer.viewport.pointFromPixel(position, true);
    return [point.x * slide.width_l0, point.y * slide.width_l0];
  }

  function redraw() {
    if (!slide) return;
    overlay.draw();
    const size = viewer.viewport.getContainerSize();
    const corners = [[0, 0], [size.x, 0], [size.x, size.y], [0, size.y]].map(([x, y]) =>
      fromElement(new OpenSeadragon.Point(x, y)));
    minimap.draw(corners, isHeatShown ? opacity : 0);
    showScale();
  }

  function showScale() {
    const zoom = cssZoom();
    const isKnown = slide.mpp !== null;
    const perPx = (isKnown ? slide.mpp : 1) / zoom;
    const length = bagscope.roundLength(LONGEST_BAR_PX * perPx);
    const text = isKnown ? bagscope.lengthText(length) : `${bagscope.whole(length)} px (level 0)`;
    byId("scale-bar").style.width = `${length / perPx}px`;
    byId("scale-text").textContent = text;
    // An objective of 10× shows about one micrometre to a pixel.
    byId("scale-power").textContent = isKnown ? `≈ ${Number((10 / perPx).toPrecision(2))}×` : "size unknown";
    byId("scale").setAttribute("aria-label", `Scale: the bar is ${text}`);
  }

  /** What is shown of the slide, and how OpenSeadragon finds its pieces. */
  function sourceOf(data) {
    const { picture } = data;
    if (!picture) {
      const box = map.count ? map.bounds() : { x: 0, y: 0, width: data.width_l0, height: data.height_l0 };
      const margin = 0.04 * Math.max(box.width, box.height) + data.tiles.size_l0;
      const frame = { x: box.x - margin, y: box.y - margin, width: box.width + 2 * margin, height: box.height + 2 * margin };
      const tileSource = {
        width: 1024, height: Math.round((1024 * frame.height) / frame.width), tileSize: 1 << 20,
        minLevel: 0, maxLevel: 0, getTileUrl: () => BLANK,
      };
      return { frame, tileSource, small: null, px_l0: frame.width / 1024 };
    }
    const folder = `slides/${encodeURIComponent(data.key)}/picture_files`;
    const longest = Math.max(picture.width, picture.height);
    const maxLevel = Math.ceil(Math.log2(longest));
    const minLevel = Math.max(0, Math.min(maxLevel, maxLevel - Math.ceil(Math.log2(longest / picture.tile_size))));
    const tileSource = {
      width: picture.width, height: picture.height, tileSize: picture.tile_size,
      tileOverlap: picture.overlap, minLevel, maxLevel,
      getTileUrl: (level, column, row) => `${folder}/${level}/${column}_${row}.jpg`,
    };
    const frame = {
      x: picture.x_l0, y: picture.y_l0,
      width: picture.width * picture.downsample, height: picture.height * picture.downsample,
    };
    return { frame, tileSource, small: `${folder}/${minLevel}/0_0.jpg`, px_l0: picture.downsample };
  }

  /** Open a slide; `view` may give layer, x, y (level 0), zoom and rotation. */
  function openSlide(data, view) {
    slide = data;
    isReady = false;
    map = new bagscope.TileMap(data.tiles);
    decoded.clear();
    overlay.showSlide(map, data.annotations);
    const { frame, tileSource, small, px_l0 } = sourceOf(data);
    byId("toggle-annotations").hidden = !data.annotations.length;
    byId("toggle-annotations").setAttribute("aria-pressed", "true");
    byId("frame-note").textContent = data.frame_note;
    byId("viewport").classList.toggle("no-picture", !data.picture);
    bagscope.showAnnotationLegend(data.annotations);
    minimap.show(frame, small, overlay);
    chooseLayer(data.layers.find((one) => one.id === view.layer)?.id ?? data.initial_layer);
    mark(null);
    readOut(null);
    return new Promise((resolve) => {
      viewer.addOnceHandler("open", () => {
        // A tile must fill a good part of the view, however coarse the picture is.
        const size = viewer.viewport.getContainerSize();
        const perTile = (0.4 * Math.min(size.x, size.y) * px_l0) / map.size;
        viewer.viewport.maxZoomPixelRatio = viewer.maxZoomPixelRatio = Math.max(OVERZOOM, perTile);
        placeView(view, true);
        viewer.forceRedraw();
        isReady = true;
        whenMoved();
        resolve();
      });
      viewer.open({
        tileSource, x: frame.x / slide.width_l0, y: frame.y / slide.width_l0, width: frame.width / slide.width_l0,
      });
    });
  }

  function placeView(view, isAtOnce) {
    viewer.viewport.setRotation(view.rotation, isAtOnce);
    if ([view.x, view.y, view.zoom].every(Number.isFinite)) moveTo(view.x, view.y, view.zoom, isAtOnce);
  }

  /** Follow a link to the slide that is open already. */
  function applyView(view) {
    if (slide.layers.some((one) => one.id === view.layer)) chooseLayer(view.layer);
    placeView(view, bagscope.isCalm());
  }

  function closeSlide() {
    slide = null;
    isReady = false;
    viewer.close();
    overlay.clear();
    overlay.draw();
  }

  function moveTo(x_l0, y_l0, zoom, isAtOnce = bagscope.isCalm()) {
    viewer.viewport.zoomTo((zoom * slide.width_l0) / viewer.viewport.getContainerSize().x, null, isAtOnce);
    viewer.viewport.panTo(at(x_l0, y_l0), isAtOnce);
  }

  /** Layer, place, zoom and rotation, as a link keeps them. */
  function view() {
    const centre = viewer.viewport.getCenter(true);
    return {
      layer: layer?.id, x: Math.round(centre.x * slide.width_l0), y: Math.round(centre.y * slide.width_l0),
      zoom: Number(cssZoom().toPrecision(4)), rotation: Math.round(viewer.viewport.getRotation()) || undefined,
    };
  }

  function chooseLayer(id) {
    layer = slide.layers.find((one) => one.id === id) ?? null;
    byId("legend").hidden = byId("toggle-heatmap").hidden = layer === null;
    bagscope.showChosenLayer(layer);
    if (!layer) {
      values = new Float32Array();
      return;
    }
    if (!decoded.has(id)) decoded.set(id, [bagscope.float32sOf(layer.values), bagscope.bytesOf(layer.lut)]);
    const [scores, lut] = decoded.get(id);
    values = scores;
    overlay.showLayer(layer, values, lut);
    bagscope.showLegend(layer, values, lut);
    applyOpacity();
    if (viewer.isOpen()) viewer.forceRedraw();
    whenMoved();
  }

  function setOpacity(share) {
    opacity = Math.min(Math.max(share, 0), 1);
    if (!isHeatShown) showHeat(true);
    applyOpacity();
  }

  function applyOpacity() {
    overlay.heat.style.opacity = isHeatShown ? opacity : 0;
    byId("opacity").value = Math.round(opacity * 100);
    byId("opacity-text").textContent = `${Math.round(opacity * 100)} %`;
    minimap.draw(undefined, isHeatShown ? opacity : 0);
  }

  function showHeat(isShown) {
    isHeatShown = isShown;
    byId("toggle-heatmap").setAttribute("aria-pressed", String(isShown));
    announce(isShown ? "Heatmap shown" : "Heatmap hidden");
    applyOpacity();
  }

  function toggleOutlines() {
    overlay.outlinesShown = !overlay.outlinesShown;
    byId("toggle-annotations").setAttribute("aria-pressed", String(overlay.outlinesShown));
    viewer.forceRedraw();
  }

  function zoomBy(factor) {
    viewer.viewport.zoomBy(factor, null, bagscope.isCalm());
    viewer.viewport.applyConstraints();
  }

  function panBy(across, down) {
    const size = viewer.viewport.getContainerSize();
    const step = new OpenSeadragon.Point(0.15 * size.x * across, 0.15 * size.y * down);
    viewer.viewport.panBy(viewer.viewport.deltaPointsFromPixels(step), bagscope.isCalm());
    viewer.viewport.applyConstraints();
  }

  const fit = () => viewer.viewport.goHome(bagscope.isCalm());
  const rotate = (degrees) => viewer.viewport.rotateBy(degrees, bagscope.isCalm());

  /** Move to a tile and mark it: the tile with some of what lies around it. */
  function jumpTo(tile, image, text) {
    const size = viewer.viewport.getContainerSize();
    const zoom = (0.22 * Math.min(size.x, size.y)) / map.size;
    mark(tile, image, text);
    moveTo(map.xs[tile] + map.size / 2, map.ys[tile] + map.size / 2, zoom);
  }

  function mark(tile, image = null, text = "") {
    overlay.marked = tile;
    byId("marked").hidden = !image;
    if (image) {
      byId("marked-image").src = image;
      byId("marked-text").textContent = text;
    }
    if (tile === null) bagscope.showChosenTile(null);
    if (viewer.isOpen()) viewer.forceRedraw();
  }

  function markAt(position) {
    if (!slide) return;
    const [x, y] = fromElement(position);
    const found = map.scoreAt(x, y, values);
    mark(found ? found.tile : null);
    bagscope.showChosenTile(null);
    readOut([x, y]);
  }

  function readAt(event) {
    if (!slide || !viewer.isOpen()) return;
    const box = viewer.canvas.getBoundingClientRect();
    readOut(fromElement(new OpenSeadragon.Point(event.clientX - box.left, event.clientY - box.top)));
  }

  function readOut(place) {
    const found = place && map.scoreAt(place[0], place[1], values);
    const before = overlay.hovered;
    overlay.hovered = found ? found.tile : null;
    bagscope.pointAt(found ? found.value : null);
    byId("readout-score").textContent = found
      ? `${bagscope.brief(found.value)} ${layer.unit_text}`
      : place ? "no tile" : "";
    byId("readout-place").textContent = place ? placeText(place) : "";
    if (before !== overlay.hovered && viewer.isOpen()) overlay.draw();
  }

  function placeText([x, y]) {
    const px = `x ${bagscope.whole(Math.floor(x))}, y ${bagscope.whole(Math.floor(y))} px`;
    if (slide.mpp === null) return `${px} (level 0)`;
    return `${px} (level 0) · ${bagscope.whole(x * slide.mpp)}, ${bagscope.whole(y * slide.mpp)} µm`;
  }

  Object.assign(bagscope, {
    startViewer, openSlide, closeSlide, applyView, chooseLayer, jumpTo, view, zoomBy, panBy, fit, rotate, toggleOutlines,
    currentSlide: () => slide,
    isViewReady: () => isReady,
    toggleHeat: () => showHeat(!isHeatShown),
    nudgeOpacity: (step) => setOpacity(opacity + step),
    clearMark: () => overlay.marked !== null && (mark(null), true),
  });
})(window.bagscope);
