"use strict";
// Sorts the table by the column whose heading is clicked, and hides the rows that lack a word of the filter.
(() => {
  const table = document.querySelector(".sortable");
  const body = table.tBodies[0];
  const headings = [...table.tHead.rows[0].cells];
  const keyOf = (row, column) => row.cells[column].dataset.key;

  const compare = (a, b) => {
    if (a === "" || b === "") return (a === "") - (b === ""); // what was not measured stands last
    const difference = Number(a) - Number(b);
    return Number.isNaN(difference) ? a.localeCompare(b, undefined, { numeric: true }) : difference;
  };

  headings.forEach((heading, column) =>
    heading.addEventListener("click", () => {
      const down = heading.getAttribute("aria-sort") === "ascending";
      for (const other of headings) other.removeAttribute("aria-sort");
      heading.setAttribute("aria-sort", down ? "descending" : "ascending");
      const rows = [...body.rows].sort((one, other) => {
        const [a, b] = [keyOf(one, column), keyOf(other, column)];
        return compare(a, b) * (down && a !== "" && b !== "" ? -1 : 1);
      });
      body.append(...rows);
    }),
  );

  document.querySelector(".filter input").addEventListener("input", (event) => {
    const words = event.target.value.toLowerCase().split(/\s+/);
    for (const row of body.rows) {
      const text = [...row.cells].map((cell) => cell.textContent).join(" ").toLowerCase();
      row.hidden = !words.every((word) => text.includes(word));
    }
  });
})();
