// Filters of the table of claims: text, facets, verdicts. Rows carry their facets as data attributes.
const form = document.querySelector(".filters");
const rows = [...document.querySelectorAll("#claims-table tbody tr")];
const original = [...rows];
const texts = new Map(rows.map((row) => [row, row.textContent.toLowerCase()]));

function filter() {
  const words = form.querySelector("input").value.toLowerCase().split(/\s+/).filter(Boolean);
  const facets = [...form.querySelectorAll("select[data-facet]")].filter((choice) => choice.value);
  const verdicts = new Set([...form.querySelectorAll("[aria-pressed=true]")].map((button) => button.dataset.verdict));
  let shown = 0;
  for (const row of rows) {
    row.hidden = !(verdicts.has(row.dataset.verdict)
      && facets.every((choice) => row.dataset[choice.dataset.facet] === choice.value)
      && words.every((word) => texts.get(row).includes(word)));
    shown += row.hidden ? 0 : 1;
  }
  form.querySelector("output").textContent = shown === rows.length ? `${shown} rows` : `${shown} of ${rows.length} rows`;
  document.getElementById("nothing").hidden = shown > 0;
}

form.addEventListener("submit", (event) => event.preventDefault());
form.addEventListener("input", filter);
for (const button of form.querySelectorAll("[data-verdict]")) {
  button.addEventListener("click", (event) => {
    // A plain click shows one verdict alone, and all again the second time; with a key held it switches this one.
    const all = [...form.querySelectorAll("[data-verdict]")];
    const alone = all.every((other) => (other.getAttribute("aria-pressed") === "true") === (other === button));
    for (const other of all) {
      if (event.ctrlKey || event.shiftKey || event.metaKey) {
        if (other === button) other.setAttribute("aria-pressed", String(other.getAttribute("aria-pressed") !== "true"));
      } else other.setAttribute("aria-pressed", String(alone || other === button));
    }
    filter();
  });
}
// The order can also be chosen where the head of the table is not shown.
form.querySelector("[data-order]").addEventListener("change", (event) => {
  const table = document.querySelector("#claims-table table");
  for (const head of table.tHead.rows[0].cells) head.removeAttribute("aria-sort");
  if (event.target.value === "") table.tBodies[0].append(...original);
  else table.tHead.rows[0].cells[Number(event.target.value)].querySelector("button").click();
});
for (const link of document.querySelectorAll("[data-pick]")) {
  link.addEventListener("click", () => {
    const choice = form.querySelector("select[data-facet=paper]");
    if (choice) choice.value = link.dataset.pick;
    filter();
  });
}
// A link must lead to a row that is shown, and to a part that is open.
function reveal() {
  const target = document.getElementById(decodeURIComponent(location.hash.slice(1)));
  if (!target) return;
  if (target.tagName === "DETAILS") target.open = true;
  if (target.hidden) {
    form.reset();
    for (const button of form.querySelectorAll("[data-verdict]")) button.setAttribute("aria-pressed", "true");
    filter();
    target.scrollIntoView();
  }
}
addEventListener("hashchange", reveal);
addEventListener("pageshow", () => { filter(); reveal(); });
