(function () {
  var root = document.documentElement, button = document.getElementById("theme");
  function stored(value) {
    try { if (value) { localStorage.setItem("retain-theme", value); } return localStorage.getItem("retain-theme"); }
    catch (error) { return null; } // a page opened from a file may not have storage
  }
  function dark() {
    return root.dataset.theme ? root.dataset.theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
  }
  function name() { button.textContent = dark() ? "Light" : "Dark"; }
  if (stored()) { root.dataset.theme = stored(); }
  button.addEventListener("click", function () { root.dataset.theme = dark() ? "light" : "dark"; stored(root.dataset.theme); name(); });
  name();
  document.addEventListener("mouseover", function (event) { // cells of a large matrix have no title of their own
    var cell = event.target.closest && event.target.closest("table.heat td");
    if (!cell || cell.title) { return; }
    var head = cell.closest("table").tHead.rows[0].cells[cell.cellIndex];
    cell.title = head.title + ", " + cell.parentNode.cells[0].title + ": " + (cell.style.getPropertyValue("--v") || "not evaluated");
  });
})();
