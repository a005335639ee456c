// Sorts the rows of the comparison by the column that is clicked, and hides those without the words typed.
// By hand: libraries for this read no "121.0 M" or "2.5·10⁹", and are ten times as long as the page allows inline.
const [body] = document.querySelector(".cards").tBodies, filter = document.querySelector("[type=search]");
const rows = [...body.rows].filter(row => row.className !== "before");
const heads = [...document.querySelectorAll(".cards thead th")];
const digits = "⁰¹²³⁴⁵⁶⁷⁸⁹", scale = {k: 1e3, M: 1e6, G: 1e9, T: 1e12, P: 1e15};
function value(cell) {
  const text = cell.textContent.replaceAll(",", "").replaceAll("−", "-").replace("·10", "e").replaceAll("⁻", "-")
    .replace(/[⁰¹²³⁴⁵⁶⁷⁸⁹]/g, digit => digits.indexOf(digit));
  const number = /^[×+]?(-?[\d.]+(?:e-?\d+)?)(?:\s([kMGTP]?)B?\b|\s|$)/.exec(text);
  return number ? number[1] * (scale[number[2]] ?? 1) : NaN;
}
function order(a, b) {
  return value(a) - value(b) || a.textContent.localeCompare(b.textContent, undefined, {numeric: true});
}
heads.forEach((head, i) => {
  const button = document.createElement("button");
  button.append(...head.childNodes);
  head.append(button);
  button.onclick = () => {
    const falling = head.ariaSort === "ascending" ? -1 : 1;
    heads.forEach(other => other.removeAttribute("aria-sort"));
    head.setAttribute("aria-sort", falling < 0 ? "descending" : "ascending");
    body.append(...rows.sort((a, b) => falling * order(a.cells[i], b.cells[i])));
  };
});
filter.closest("p").hidden = false;
filter.oninput = () => rows.forEach(row => {
  row.hidden = !filter.value.toLowerCase().split(/\s+/).every(word => row.textContent.toLowerCase().includes(word));
});
