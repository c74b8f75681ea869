// The page's one global, and what every part of it uses: elements, data in base64, announcements.
// Text from data reaches the page through textContent alone.
window.bagscope = (function () {
  "use strict";

  const byId = (id) => document.getElementById(id);

  /** Make an element: properties, `data-`/`aria-` attributes, then children (nodes or text). */
  function el(tag, properties = {}, ...children) {
    const element = document.createElement(tag);
    for (const [name, value] of Object.entries(properties)) {
      if (value === null || value === undefined || value === false) continue;
      if (name === "class") element.className = value;
      else if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
      else if (name in element && !name.includes("-")) element[name] = value;
      else element.setAttribute(name, value === true ? "" : value);
    }
    element.append(...children.filter((child) => child !== null && child !== undefined));
    return element;
  }

  function bytesOf(base64) {
    const text = atob(base64);
    const bytes = new Uint8Array(text.length);
    for (let i = 0; i < text.length; i++) bytes[i] = text.charCodeAt(i);
    return bytes;
  }

  /** Call with little-endian data only, which every browser's machine reads as it lies. */
  const int32sOf = (base64) => new Int32Array(bytesOf(base64).buffer);
  const float32sOf = (base64) => new Float32Array(bytesOf(base64).buffer);

  function announce(text) {
    byId("said").textContent = text;
  }

  function fault(text) {
    byId("fault").textContent = text;
    byId("fault").hidden = !text;
  }

  /** Run at the next frame, once, however often it is asked for. */
  function atNextFrame(work) {
    let asked = false;
    return () => {
      if (asked) return;
      asked = true;
      requestAnimationFrame(() => {
        asked = false;
        work();
      });
    };
  }

  const waiting = new Map();

  /** Read a slide's data by the only way that file:// allows: as a script that calls `slide`. */
  function loadSlide(key) {
    return new Promise((resolve, reject) => {
      const source = `slides/${encodeURIComponent(key)}/slide.js`;
      const script = el("script", { src: source });
      const fail = (why) => {
        waiting.delete(key);
        script.remove();
        reject(new Error(`${source} ${why}.`));
      };
      waiting.set(key, (data) => {
        waiting.delete(key);
        script.remove();
        resolve(data);
      });
      script.onerror = () => fail("could not be read: is the folder whole?");
      script.onload = () => waiting.has(key) && fail("holds no data of this slide");
      document.head.append(script);
    });
  }

  function slide(data) {
    const resolve = waiting.get(data.key);
    if (resolve) resolve(data);
  }

  const calm = matchMedia("(prefers-reduced-motion: reduce)");

  return {
    byId, el, bytesOf, int32sOf, float32sOf, announce, fault, atNextFrame, loadSlide, slide,
    isCalm: () => calm.matches,
  };
})();
