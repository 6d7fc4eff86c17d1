"use strict";
/* The button that switches between light and dark; a page that draws with colours listens to "theme". */
const theme = document.getElementById("theme");
const system = matchMedia("(prefers-color-scheme: dark)");
const isDark = () => (document.documentElement.dataset.theme || (system.matches ? "dark" : "light")) === "dark";
function named() {
  theme.textContent = isDark() ? "Light" : "Dark";
  document.dispatchEvent(new Event("theme"));
}
theme.addEventListener("click", () => {
  document.documentElement.dataset.theme = isDark() ? "light" : "dark";
  named();
});
system.addEventListener("change", named);
named();
