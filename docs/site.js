// What the theme lacks for keyboards and screen readers: a name for the search, and focus for what scrolls.
document$.subscribe(() => {
  document.querySelector(".md-search")?.setAttribute("aria-label", "Search");
  document.querySelectorAll("pre > code, .md-typeset__scrollwrap, .highlight-ipynb, .jp-OutputArea-output")
    .forEach(part => { part.tabIndex = 0; });
});
