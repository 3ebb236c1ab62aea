// The search and the switch for dark of a page of the offline book.
(() => {
  const find = q => document.querySelector(q), root = document.documentElement;
  if (matchMedia("(max-width: 70rem)").matches) find(".side details").open = false;

  const mode = find(".mode"), night = matchMedia("(prefers-color-scheme: dark)");
  const dark = () => root.dataset.scheme ? root.dataset.scheme === "dark" : night.matches;
  const tell = () => mode.setAttribute("aria-pressed", dark());
  mode.onclick = () => {
    root.dataset.scheme = dark() ? "light" : "dark";
    try { localStorage.scheme = root.dataset.scheme; } catch {}
    tell();
  };
  night.onchange = tell;
  tell();

  // what can be found lies in search/, a script for each page: a file may not fetch
  const input = find("input[type=search]"), list = find(".found"), rows = [];
  const pages = new Set([...document.querySelectorAll(".side li a, .side .home a")].map(
    a => a.getAttribute("href").split("#")[0]).filter(name => name && name !== "api.html"));
  window.bookFound = ([page, title, parts]) => {
    for (const [id, heading, text] of parts) rows.push(
      {link: page + (id && "#" + id), name: title + (heading && ": " + heading), text});
    show();
  };
  const load = () => pages.forEach(page => {
    const script = document.createElement("script");
    script.src = "search/" + page + ".js";
    document.head.append(script);
    pages.delete(page);
  });
  const show = () => {
    const words = input.value.toLowerCase().split(/\s+/).filter(Boolean), scored = [];
    if (words.length) for (const row of rows) {
      const name = row.name.toLowerCase(), text = row.text.toLowerCase();
      if (words.every(w => name.includes(w) || text.includes(w)))
        scored.push([words.filter(w => name.includes(w)).length, row]);
    }
    scored.sort((a, b) => b[0] - a[0]);
    list.replaceChildren(...scored.slice(0, 20).map(([, row]) => {
      const item = document.createElement("li"), link = document.createElement("a");
      const at = Math.max(0, row.text.toLowerCase().indexOf(words[0]) - 40);
      link.href = row.link;
      link.textContent = row.name;
      item.append(link, document.createElement("br"), row.text.slice(at, at + 110));
      return item;
    }));
    if (words.length && !scored.length) list.textContent = "Nothing found.";
    list.hidden = !words.length;
  };
  input.onfocus = load;
  input.oninput = () => { load(); show(); };
  find(".tools").onsubmit = event => {
    event.preventDefault();
    list.querySelector("a")?.click();
  };
})();
