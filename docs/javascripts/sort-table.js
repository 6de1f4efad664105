// Sorts a table by the column whose head is clicked, and the other way round at the second click.
// It works on the pages that have a paragraph of the class "sort-hint", which it shows.
// Without JavaScript the tables are as they are.
function makeSortable(table) {
  const heads = [...table.querySelectorAll("thead th")];
  const body = table.querySelector("tbody");
  const valueOf = (row, column) => {
    const text = row.cells[column].textContent.trim();
    if (text === "-") return Infinity;
    return text !== "" && isFinite(text) ? Number(text) : text.toLowerCase();
  };
  const sortBy = (column) => {
    const head = heads[column];
    const up = head.getAttribute("aria-sort") !== "ascending";
    heads.forEach((other) => other.removeAttribute("aria-sort"));
    head.setAttribute("aria-sort", up ? "ascending" : "descending");
    const compare = (a, b) => {
      const [x, y] = [valueOf(a, column), valueOf(b, column)];
      const order = x < y ? -1 : x > y ? 1 : 0;
      return up ? order : -order;
    };
    body.append(...[...body.rows].sort(compare));
  };
  heads.forEach((head, column) => {
    head.style.cursor = "pointer";
    head.tabIndex = 0;
    head.addEventListener("click", () => sortBy(column));
    head.addEventListener("keydown", (event) => event.key === "Enter" && sortBy(column));
  });
}

document.addEventListener("DOMContentLoaded", () => {
  const hint = document.querySelector(".sort-hint");
  if (!hint) return;
  hint.hidden = false;
  document.querySelectorAll("article table").forEach(makeSortable);
});
