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
})();
