// Sorts tables, and leafs through scans. Everything it shows is in the page.
"use strict";
(() => {
  const PLANES = ["axial", "coronal", "sagittal"];
  const LONGEST = 720; // pixels of a picture's longest side
  const $ = (id) => document.getElementById(id);

  // --- Tables -------------------------------------------------------------------------------

  const text = new Intl.Collator(undefined, { numeric: true });

  function sort(head) {
    const table = head.closest("table");
    const down = head.getAttribute("aria-sort") === "ascending";
    for (const other of head.parentNode.cells) other.setAttribute("aria-sort", "none");
    head.setAttribute("aria-sort", down ? "descending" : "ascending");
    const column = head.cellIndex;
    const sign = down ? -1 : 1;
    const rows = [...table.tBodies[0].rows].map((row) => {
      const cell = row.cells[column];
      return { row, key: cell.dataset.key, text: cell.textContent };
    });
    rows.sort((a, b) => {
      if (a.key === undefined || b.key === undefined) return sign * text.compare(a.text, b.text);
      if (a.key === "last" || b.key === "last") return (a.key === "last") - (b.key === "last");
      return sign * (Number(a.key) - Number(b.key));
    });
    table.tBodies[0].append(...rows.map((item) => item.row));
  }

  for (const button of document.querySelectorAll("thead button")) {
    button.addEventListener("click", () => sort(button.closest("th")));
  }

  // --- Scans --------------------------------------------------------------------------------

  if (!$("viewer")) return;
  const organs = [...document.querySelectorAll(".organ")];
  const colours = organs.map((box) =>
    [1, 3, 5].map((at) => parseInt(box.dataset.colour.slice(at, at + 2), 16)));
  const opacity = $("opacity");
  let shown = null; // the planes of the scan that is shown
  let turn = 0;

  function bytes(base64) {
    return Uint8Array.from(atob(base64), (letter) => letter.charCodeAt(0));
  }

  async function unpack(base64) {
    const stream = new Blob([bytes(base64)]).stream().pipeThrough(new DecompressionStream("deflate"));
    return new Uint8Array(await new Response(stream).arrayBuffer());
  }

  async function decode(plane) {
    const picture = plane.image
      ? await createImageBitmap(new Blob([bytes(plane.image)], { type: "image/jpeg" })) : null;
    return { ...plane, picture, labels: await unpack(plane.labels) };
  }

  async function open(number) {
    const mine = ++turn;
    const scan = JSON.parse($("scan-data-" + number).textContent);
    let planes;
    try {
      planes = await Promise.all(scan.planes.map(decode));
    } catch (error) {
      $("doubts").textContent = "This browser cannot show the pictures: " + error.message;
      return;
    }
    if (mine !== turn) return; // another one was chosen meanwhile
    shown = {};
    $("scan").value = number;
    $("previous").disabled = number === 0;
    $("next").disabled = number === $("scan").length - 1;
    $("doubts").textContent = scan.doubts.join("; ");
    for (const plane of planes) {
      shown[plane.plane] = plane;
      const slider = $(plane.plane + "-slice");
      slider.max = plane.numbers.length - 1;
      slider.value = plane.first;
      const canvas = $(plane.plane);
      const scale = LONGEST / Math.max(...plane.mm);
      canvas.height = Math.max(1, Math.round(plane.mm[0] * scale));
      canvas.width = Math.max(1, Math.round(plane.mm[1] * scale));
      draw(plane.plane);
    }
    for (const link of document.querySelectorAll("tbody th a")) {
      link.closest("tr").classList.toggle("shown", link.hash === "#scan-" + number);
    }
    $("viewer").dataset.scan = number;
  }

  // Outlines by marching squares between the centres of pixels. In the order of corners top left,
  // top right, bottom right, bottom left: which sides (0 top, 1 right, 2 bottom, 3 left) a line joins.
  const SIDES = [[], [[3, 0]], [[0, 1]], [[3, 1]], [[1, 2]], [[3, 0], [1, 2]], [[0, 2]], [[3, 2]],
    [[2, 3]], [[0, 2]], [[0, 1], [2, 3]], [[1, 2]], [[3, 1]], [[0, 1]], [[3, 0]], []];
  const MIDDLES = [[0.5, 0], [1, 0.5], [0.5, 1], [0, 0.5]]; // of the sides: x, y

  function outlines(labels, rows, cols, visible) {
    const paths = new Map();
    const at = (row, col) =>
      row < 0 || col < 0 || row >= rows || col >= cols ? 0 : labels[row * cols + col];
    for (let row = -1; row < rows; row++) {
      for (let col = -1; col < cols; col++) {
        const corners = [at(row, col), at(row, col + 1), at(row + 1, col + 1), at(row + 1, col)];
        const [a, b, c, d] = corners;
        if (a === b && b === c && c === d) continue;
        for (const label of new Set(corners)) {
          if (!label || !visible[label - 1]) continue;
          if (!paths.has(label)) paths.set(label, []);
          const index = corners.reduce((sum, other, bit) => sum + ((other === label) << bit), 0);
          for (const [from, to] of SIDES[index]) {
            const ends = [from, to].map((side) =>
              [col + 0.5 + MIDDLES[side][0], row + 0.5 + MIDDLES[side][1]]);
            paths.get(label).push(ends);
          }
        }
      }
    }
    return paths;
  }

  function draw(name) {
    const plane = shown[name];
    const index = Number($(name + "-slice").value);
    const { rows, cols, pitch, picture } = plane;
    const canvas = $(name);
    const pen = canvas.getContext("2d");
    const labels = plane.labels.subarray(index * rows * cols, (index + 1) * rows * cols);
    const visible = organs.map((box) => box.checked);
    pen.globalAlpha = 1;
    pen.fillStyle = "#000";
    pen.fillRect(0, 0, canvas.width, canvas.height);
    pen.imageSmoothingQuality = "high";
    if (picture) {
      pen.drawImage(picture, 0, index * pitch, cols, rows, 0, 0, canvas.width, canvas.height);
    }

    const filled = new ImageData(cols, rows);
    const present = new Set();
    labels.forEach((label, place) => {
      if (!label) return;
      present.add(label);
      if (visible[label - 1]) filled.data.set([...colours[label - 1], 255], 4 * place);
    });
    const layer = document.createElement("canvas");
    layer.width = cols;
    layer.height = rows;
    layer.getContext("2d").putImageData(filled, 0, 0);
    pen.globalAlpha = opacity.value / 100;
    pen.drawImage(layer, 0, 0, canvas.width, canvas.height);

    pen.globalAlpha = 1;
    pen.lineWidth = 2.5;
    pen.lineCap = "round";
    const [right, down] = [canvas.width / cols, canvas.height / rows];
    for (const [label, lines] of outlines(labels, rows, cols, visible)) {
      pen.strokeStyle = organs[label - 1].dataset.colour;
      pen.beginPath();
      for (const [[x, y], [u, v]] of lines) {
        pen.moveTo(x * right, y * down);
        pen.lineTo(u * right, v * down);
      }
      pen.stroke();
    }

    const where = plane.numbers[index] + " of " + plane.total;
    const names = organs.filter((_, n) => present.has(n + 1)).map((box) => box.dataset.name);
    const what = names.length ? names.join(", ") : "no organ";
    $(name + "-text").textContent = where;
    $(name + "-slice").setAttribute("aria-valuetext", where + ": " + what);
    canvas.setAttribute("aria-label", name + " slice " + where + ": " + what);
  }

  const redraw = () => shown && PLANES.forEach(draw);

  function go(number) {
    const address = "#scan-" + number;
    if (location.hash === address) open(number);
    else location.hash = address; // `follow` opens it
  }

  function follow(event) {
    const match = /^#scan-(\d+)$/.exec(location.hash);
    const number = match ? Number(match[1]) : 0;
    if (match ? number < $("scan").length : !event) open(number);
    if (match && !$("viewer").contains(document.activeElement)) {
      $("viewer").scrollIntoView();
      $("viewer").focus({ preventScroll: true });
    }
  }

  for (const name of PLANES) {
    $(name + "-slice").addEventListener("input", () => shown && draw(name));
    $(name).addEventListener("click", () => $(name + "-slice").focus());
  }
  opacity.addEventListener("input", () => {
    $("opacity-text").textContent = opacity.value + " %";
    opacity.setAttribute("aria-valuetext", opacity.value + " %");
    redraw();
  });
  for (const box of organs) box.addEventListener("change", redraw);
  for (const [id, on] of [["all", true], ["none", false]]) {
    $(id).addEventListener("click", () => {
      for (const box of organs) box.checked = on;
      redraw();
    });
  }
  $("scan").addEventListener("change", () => go(Number($("scan").value)));
  $("previous").addEventListener("click", () => go(Number($("scan").value) - 1));
  $("next").addEventListener("click", () => go(Number($("scan").value) + 1));
  window.addEventListener("hashchange", follow);
  document.addEventListener("click", (event) => {
    const link = event.target.closest('a[href^="#scan-"]');
    if (link && link.getAttribute("href") === location.hash) follow(); // no change, no event
  });
  follow();
})();
