"use strict";
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const table = document.getElementById("sites");
  const body = table.tBodies[0];
  const rows = [...body.rows];
  const headings = [...table.tHead.rows[0].cells];
  const search = document.getElementById("search");
  const select = document.getElementById("sort");
  const boxes = [...document.querySelectorAll(".filter input")];
  const details = new Map(); // of the sites that were opened, by row

  const element = (tag, options = {}, ...children) => {
    const made = document.createElement(tag);
    for (const [name, value] of Object.entries(options)) made.setAttribute(name, value);
    made.append(...children);
    return made;
  };
  const drawing = (tag, attributes, ...children) => {
    const made = document.createElementNS("http://www.w3.org/2000/svg", tag);
    for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
    made.append(...children);
    return made;
  };

  // ---------------------------------------------------------------- filter

  const filter = () => {
    const words = search.value.toLowerCase().split(/\s+/).filter(Boolean);
    const statuses = new Set(boxes.filter((box) => box.checked).map((box) => box.value));
    let shown = 0;
    for (const row of rows) {
      const fits = statuses.has(row.dataset.status)
        && words.every((word) => row.dataset.words.includes(word));
      row.hidden = !fits;
      shown += fits;
      const detail = details.get(row);
      if (detail) detail.hidden = !fits || !isOpen(row);
    }
    document.getElementById("shown").textContent = `${shown} of ${rows.length} sites`;
    document.getElementById("none").hidden = shown > 0;
  };

  // ------------------------------------------------------------------ sort

  const isNumber = (heading) => heading.classList.contains("number");

  // What is unknown comes last, whichever way the rest is sorted.
  const compare = (column, numeric, sign) => (a, b) => {
    const [x, y] = [a.cells[column].dataset.sort, b.cells[column].dataset.sort];
    if (x === "" || y === "") return (x === "") - (y === "");
    return sign * (numeric ? x - y : x.localeCompare(y, "en", { numeric: true }));
  };

  const sortBy = (key, direction) => {
    const column = headings.findIndex((heading) => heading.dataset.key === key);
    for (const heading of headings) heading.setAttribute("aria-sort", "none");
    const sorted = [...rows];
    if (column >= 0) {
      headings[column].setAttribute("aria-sort", direction);
      sorted.sort(compare(column, isNumber(headings[column]), direction === "ascending" ? 1 : -1));
    }
    select.value = column >= 0 ? key : "worst";
    const fragment = document.createDocumentFragment();
    for (const row of sorted) {
      fragment.append(row);
      if (details.has(row)) fragment.append(details.get(row));
    }
    body.append(fragment);
  };

  // The first press shows the end that one looks for: the lowest ratio, the largest share.
  const firstDirection = (heading) =>
    isNumber(heading) && heading.dataset.key !== "sqnr" ? "descending" : "ascending";
  const turned = { ascending: "descending", descending: "ascending" };

  for (const heading of headings) {
    heading.firstElementChild.addEventListener("click", () =>
      sortBy(heading.dataset.key, turned[heading.getAttribute("aria-sort")] ?? firstDirection(heading)));
  }
  select.addEventListener("change", () => {
    const heading = headings.find((one) => one.dataset.key === select.value);
    sortBy(select.value, heading && firstDirection(heading));
  });

  // --------------------------------------------------------------- details

  const button = (row) => row.querySelector(".open");
  const isOpen = (row) => button(row).getAttribute("aria-expanded") === "true";

  const toggle = (row) => {
    const open = !isOpen(row);
    if (open && !details.has(row)) {
      const id = `detail-${row.dataset.index}`;
      const cell = element("td", { role: "cell", colspan: headings.length });
      cell.append(...describe(data.sites[row.dataset.index]));
      const detail = element("tr", { role: "row", class: "detail", id }, cell);
      details.set(row, detail);
      button(row).setAttribute("aria-controls", id);
      row.after(detail);
    }
    button(row).setAttribute("aria-expanded", open);
    details.get(row).hidden = !open;
  };

  body.addEventListener("click", (event) => {
    const row = event.target.closest("tr.site");
    if (row && (event.target.closest(".open") || !getSelection().toString())) toggle(row);
  });

  const describe = (site) => {
    const parts = [];
    const facts = element("dl", { class: "facts" });
    for (const [name, value] of site.facts) {
      facts.append(element("dt", {}, name), element("dd", {}, value));
    }
    parts.push(facts);
    if (site.products.length) parts.push(productsOf(site.products));
    if (site.operands.length) parts.push(...historiesOf(site));
    return parts;
  };

  const productsOf = (products) => {
    const columns = [["sqnr", "SQNR"], ["slice", "worst row or column"], ["engine", "compiled as"]]
      .filter(([key]) => products.some((product) => product[key] !== null));
    const heading = element("tr", {}, element("th", { scope: "col" }, "product"));
    for (const [, name] of columns) heading.append(element("th", { scope: "col" }, name));
    const lines = products.map((product) => element("tr", {},
      element("th", { scope: "row" }, product.product),
      ...columns.map(([key]) => element("td", { class: key }, product[key] ?? "–"))));
    return element("table", { class: "products" },
      element("thead", {}, heading), element("tbody", {}, ...lines));
  };

  const historiesOf = (site) => {
    const plots = element("div", { class: "plots" });
    const draw = (label) => plots.replaceChildren(...site.operands.map((operand) =>
      figureOf(site, operand,
        operand.layers.find((layer) => layer.label === label) ?? operand.layers[0])));
    const labels = [...new Set(site.operands.flatMap((one) => one.layers.map((layer) => layer.label)))];
    const worst = worstLayer(site.operands);
    const parts = [];
    if (labels.length > 1) {
      const chosen = element("select");
      for (const label of labels) chosen.append(element("option", { value: label }, label));
      chosen.value = worst;
      chosen.addEventListener("change", () => draw(chosen.value));
      parts.push(element("label", { class: "layer" }, "Layer", chosen));
    }
    draw(worst);
    const key = element("div", { class: "key" });
    for (const [name, text] of [["amax", "amax"], ["limit", data.recorded
      ? "largest value that the scale can represent"
      : "largest value that the scale, as it is now, can represent"],
      ["over", "amax beyond it"]]) {
      key.append(element("span", { class: name }, element("i"), text));
    }
    return [...parts, plots, key];
  };

  // The layer that used most of its range.
  const worstLayer = (operands) => {
    let [most, label] = [-Infinity, operands[0].layers[0].label];
    for (const layer of operands.flatMap((operand) => operand.layers)) {
      layer.amaxes.forEach((amax, index) => {
        const used = amax === null || layer.limits[index] === null ? -Infinity : amax / layer.limits[index];
        if (used > most) [most, label] = [used, layer.label];
      });
    }
    return label;
  };

  const figureOf = (site, operand, layer) => {
    const said = [layer.exponent === null ? "scale unknown" : `scale 2${superscript(layer.exponent)}`];
    if (layer.saturated !== null) said.push(`${layer.saturated} saturated`);
    if (layer.flushed !== null) said.push(`${layer.flushed} flushed`);
    if (layer.faults) said.push(`${layer.faults} not stored`);
    if (operand.leftOut) said.push(`${operand.leftOut} more scales not listed`);
    const readout = element("div", { class: "readout", "aria-hidden": "true" });
    const caption = element("figcaption", {},
      element("b", {}, `${operand.name}${layer.label} in ${operand.format}`),
      element("span", {}, said.join(", ")));
    const drawn = layer.amaxes.some((amax) => amax !== null)
      ? plotOf(`${site.name}, ${operand.name}${layer.label}`, layer, readout)
      : element("p", { class: "readout" }, "Nothing was observed.");
    return element("figure", {}, caption, drawn, readout);
  };

  // ----------------------------------------------------------------- plots

  const [WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM] = [340, 180, 40, 8, 8, 24];

  const plotOf = (name, layer, readout) => {
    const values = [...layer.amaxes, ...layer.limits].filter((value) => value > 0).map(Math.log2);
    const [low, high] = [Math.floor(Math.min(...values) - 0.2), Math.ceil(Math.max(...values) + 0.2)];
    const [first, last] = [layer.steps[0], Math.max(layer.steps.at(-1), layer.steps[0] + 1)];
    const x = (step) => LEFT + ((WIDTH - LEFT - RIGHT) * (step - first)) / (last - first);
    const y = (value) => TOP + ((HEIGHT - TOP - BOTTOM) * (high - Math.log2(value))) / (high - low);
    const over = layer.steps.map((_, index) => index).filter((index) =>
      layer.amaxes[index] !== null && layer.limits[index] !== null && layer.amaxes[index] > layer.limits[index]);
    const plot = drawing("svg", {
      class: "plot", viewBox: `0 0 ${WIDTH} ${HEIGHT}`, role: "img",
      "aria-label": `${name}: amaxes over ${layer.steps.at(-1)} steps between 2^${low} and 2^${high}, `
        + `${over.length} beyond the scale's range`,
    });
    const spacing = Math.max(1, Math.ceil((high - low) / 5));
    for (let power = high; power >= low; power -= spacing) {
      const place = y(2 ** power);
      plot.append(
        drawing("line", { class: "grid", x1: LEFT, x2: WIDTH - RIGHT, y1: place, y2: place }),
        drawing("text", { x: LEFT - 6, y: place + 4, "text-anchor": "end" }, `2${superscript(power)}`));
    }
    for (const [step, anchor] of [[first, "start"], [last, "end"]]) {
      plot.append(drawing("text", { x: x(step), y: HEIGHT - 6, "text-anchor": anchor },
        step === first ? `step ${step}` : step));
    }
    plot.append(
      drawing("path", { class: "amax", d: path(layer.steps, layer.amaxes, x, y, false) }),
      drawing("path", { class: "limit", d: path(layer.steps, layer.limits, x, y, true) }));
    for (const index of over) {
      plot.append(drawing("circle", { class: "over", r: 2.6, cx: x(layer.steps[index]), cy: y(layer.amaxes[index]) }));
    }
    follow(plot, layer, x, first, last, readout);
    return plot;
  };

  const superscript = (power) => [...String(power)].map((digit) => "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"["-0123456789".indexOf(digit)]).join("");

  // A line through what is known, with gaps where nothing is; a scale moves in stairs.
  const path = (steps, values, x, y, stairs) => {
    let [text, pen, before] = ["", false, 0];
    values.forEach((value, index) => {
      if (!(value > 0)) { pen = false; return; }
      const [left, top] = [x(steps[index]).toFixed(1), y(value).toFixed(1)];
      if (pen && stairs && top !== before) text += `H${left}`;
      text += `${pen ? "L" : "M"}${left} ${top}`;
      if (!pen && !(values[index + 1] > 0)) text += "h1";
      [pen, before] = [true, top];
    });
    return text;
  };

  const follow = (plot, layer, x, first, last, readout) => {
    const cursor = drawing("line", { class: "cursor", y1: TOP, y2: HEIGHT - BOTTOM, visibility: "hidden" });
    plot.append(cursor);
    const number = (value) => (value === null ? "–" : Number(value.toPrecision(3)).toString());
    plot.addEventListener("pointermove", (event) => {
      const box = plot.getBoundingClientRect();
      const at = first + ((event.clientX - box.left) / box.width * WIDTH - LEFT) / (WIDTH - LEFT - RIGHT) * (last - first);
      let nearest = 0;
      layer.steps.forEach((step, index) => {
        if (Math.abs(step - at) < Math.abs(layer.steps[nearest] - at)) nearest = index;
      });
      const place = x(layer.steps[nearest]);
      for (const end of ["x1", "x2"]) cursor.setAttribute(end, place);
      cursor.setAttribute("visibility", "visible");
      readout.textContent = `step ${layer.steps[nearest]}: amax ${number(layer.amaxes[nearest])}, `
        + `largest ${number(layer.limits[nearest])}`;
    });
    plot.addEventListener("pointerleave", () => {
      cursor.setAttribute("visibility", "hidden");
      readout.textContent = "";
    });
  };

  // ------------------------------------------------------------- beginning

  search.addEventListener("input", filter);
  for (const box of boxes) box.addEventListener("change", filter);
  document.addEventListener("keydown", (event) => {
    if (event.key === "/" && !/^(INPUT|SELECT)$/.test(document.activeElement.tagName)) {
      event.preventDefault();
      search.focus();
    }
  });
  filter();
})();
