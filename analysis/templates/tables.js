// Tables that sort: a column's head is a button. First click ascending, second descending, third as it was.
(() => {
  "use strict";
  const texts = new Intl.Collator("en", {numeric: true});
  const arrows = {ascending: "▲", descending: "▼"};

  // Numbers by their value, whatever the cell shows; null is missing.
  function key(cell) {
    if (cell === undefined) return null;
    if (cell.dataset.value !== undefined) return cell.dataset.value === "" ? null : Number(cell.dataset.value);
    const text = cell.textContent.trim();
    return text === "" || text === "–" ? null : text;
  }

  function compare(a, b) {
    return typeof a === "number" && typeof b === "number" ? a - b : texts.compare(String(a), String(b));
  }

  for (const table of document.querySelectorAll(".page table")) {
    const heads = [...table.querySelectorAll("thead th")];
    const body = table.tBodies[0];
    const original = [...body.rows];

    function sort(column, order) {
      heads.forEach((head, i) => {
        if (i === column && order) head.setAttribute("aria-sort", order);
        else head.removeAttribute("aria-sort");
        head.querySelector(".order").textContent = i === column && order ? arrows[order] : "";
      });
      const keyed = original.map(row => [key(row.cells[column]), row]);
      const known = keyed.filter(([value]) => value !== null);
      const missing = keyed.filter(([value]) => value === null);
      const sign = order === "descending" ? -1 : 1;
      if (order) known.sort(([a], [b]) => sign * compare(a, b));  // stable
      body.append(...(order ? [...known, ...missing].map(([, row]) => row) : original));
    }

    heads.forEach((head, column) => {
      const button = document.createElement("button");
      const mark = document.createElement("span");
      button.type = "button";
      button.className = "sort";
      button.title = "Sort by this column";
      mark.className = "order";
      mark.ariaHidden = "true";
      button.append(...head.childNodes);
      // On the side where there is room: outside the table there is none.
      if (getComputedStyle(head).textAlign === "right") button.prepend(mark);
      else button.append(mark);
      head.append(button);
      button.addEventListener("click", () => {
        const next = {ascending: "descending", descending: null}[head.getAttribute("aria-sort")];
        sort(column, next === undefined ? "ascending" : next);
      });
    });
  }
})();
