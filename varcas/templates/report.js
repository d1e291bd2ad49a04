"use strict";
(() => {
  const text = (cell) => cell.textContent.trim();
  const number = (found) => {
    const plain = found.replace(/[,\s%x]/g, "");
    return plain === "" || plain === "–" ? NaN : Number(plain);
  };
  const compare = (one, other) => {
    const [a, b] = [number(one), number(other)];
    if (Number.isNaN(a) !== Number.isNaN(b)) return Number.isNaN(a) ? 1 : -1;
    return Number.isNaN(a) ? one.localeCompare(other) : a - b;
  };

  for (const table of document.querySelectorAll("table")) {
    const body = table.tBodies[0];
    if (!body || body.rows.length < 2) continue;
    [...table.tHead.rows[0].cells].forEach((head, column) => {
      const button = document.createElement("button");
      button.type = "button";
      button.append(...head.childNodes);
      head.append(button);
      button.addEventListener("click", () => {
        const way = head.getAttribute("aria-sort") === "ascending" ? -1 : 1;
        for (const other of table.tHead.rows[0].cells) other.removeAttribute("aria-sort");
        head.setAttribute("aria-sort", way === 1 ? "ascending" : "descending");
        const rows = [...body.rows].map((row) => [text(row.cells[column]), row]);
        rows.sort((a, b) => (a[0] === "–" || b[0] === "–" ? compare(a[0], b[0]) : way * compare(a[0], b[0])));
        body.append(...rows.map(([, row]) => row));
      });
    });
  }

  for (const table of document.querySelectorAll("table.many")) {
    const input = document.createElement("input");
    input.type = "search";
    input.className = "filter";
    input.placeholder = "Filter rows, e.g. max_num_seqs=8";
    input.setAttribute("aria-label", "Filter rows of " + text(table.caption));
    input.addEventListener("input", () => {
      const wanted = input.value.toLowerCase();
      for (const row of table.tBodies[0].rows) row.hidden = !row.textContent.toLowerCase().includes(wanted);
    });
    table.closest(".scroll").before(input);
  }

  for (const block of document.querySelectorAll("pre")) {
    const button = document.createElement("button");
    button.type = "button";
    button.className = "copy";
    button.textContent = "Copy";
    button.addEventListener("click", async () => {
      try {
        await navigator.clipboard.writeText(block.textContent);
        button.textContent = "Copied";
      } catch {
        getSelection().selectAllChildren(block);
        button.textContent = "Selected";
      }
    });
    block.before(button);
  }

  const tip = document.createElement("div");
  tip.id = "tip";
  tip.hidden = true;
  tip.setAttribute("aria-hidden", "true");
  document.body.append(tip);
  const marked = (event) => event.target.closest && event.target.closest(".plot svg [aria-label]");
  document.addEventListener("pointermove", (event) => {
    const mark = marked(event);
    tip.hidden = !mark || !mark.getAttribute("aria-label");
    if (tip.hidden) return;
    tip.textContent = mark.getAttribute("aria-label");
    tip.style.left = Math.min(event.clientX + 14, innerWidth - tip.offsetWidth - 8) + "px";
    tip.style.top = Math.min(event.clientY + 14, innerHeight - tip.offsetHeight - 8) + "px";
  });
  document.addEventListener("click", (event) => {
    const mark = marked(event);
    const found = mark && /^trial (\d+):/.exec(mark.getAttribute("aria-label"));
    if (found) location.hash = "t" + found[1];
  });
  addEventListener("beforeprint", () => {
    for (const fold of document.querySelectorAll("details:not(.long)")) fold.open = true;
  });
})();
