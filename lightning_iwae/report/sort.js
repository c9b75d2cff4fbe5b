const all = (selector, root = document) => [...root.querySelectorAll(selector)];

// tables sorted by the column whose head is pressed; numbers first falling, then rising
for (const table of all("table.sortable")) all("thead th", table).forEach((head, column) => {
  head.querySelector("button")?.addEventListener("click", () => {
    const down = head.getAttribute("aria-sort") !== "descending";
    all("thead th", table).forEach(h => h.removeAttribute("aria-sort"));
    head.setAttribute("aria-sort", down ? "descending" : "ascending");
    const key = row => { const cell = row.cells[column]; return cell.dataset.v ?? cell.textContent.trim(); };
    const empty = k => k === "" || k === "–";
    const rows = all("tbody tr", table).map(row => [key(row), row]);
    rows.sort(([a], [b]) => {
      if (empty(a) || empty(b)) return empty(a) - empty(b);
      const order = isNaN(a) || isNaN(b) ? b.localeCompare(a, undefined, {numeric: true}) : a - b;
      return down ? -order : order;
    });
    table.tBodies[0].append(...rows.map(([, row]) => row));
  });
});
