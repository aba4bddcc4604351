// The top of the page, what failed, the theme; then all of it begins.
const SENTENCES = 30; // of a code
const EXAMPLES = 6; // prompts of a sentence

function grouped(list, key) {
  const groups = new Map();
  for (const each of list) {
    if (!groups.has(key(each))) groups.set(key(each), []);
    groups.get(key(each)).push(each);
  }
  return [...groups].sort((a, b) => b[1].length - a[1].length);
}

function reason([sentence, those]) {
  const buttons = those
    .slice(0, EXAMPLES)
    .map((item) => make("button", { type: "button", text: item.text || item.id, onclick: () => open(item) }));
  const rest =
    those.length > EXAMPLES
      ? make("small", { text: `and ${whole.format(those.length - EXAMPLES)} more` })
      : null;
  const count = those.length > 1 ? ` (${whole.format(those.length)} times)` : "";
  return make(
    "li",
    {},
    make("p", { text: (sentence || "no reason is recorded") + count }),
    make("div", { class: "prompts" }, ...buttons, rest),
  );
}

function drawFailures() {
  const groups = grouped(items.filter(failed), (item) => item.code);
  $("failures").hidden = !groups.length;
  for (const [code, those] of groups) {
    const reasons = grouped(those, (item) => item.sentence);
    const all = make("button", {
      type: "button",
      text: `Show ${those.length === 1 ? "it" : `these ${whole.format(those.length)}`} below`,
      onclick: () => {
        $("status").value = `code ${code}`;
        show();
        $("pictures").scrollIntoView();
        $("pictures").focus({ preventScroll: true });
      },
    });
    const more =
      reasons.length > SENTENCES
        ? make("li", { text: `and ${whole.format(reasons.length - SENTENCES)} more reasons` })
        : null;
    const summary = make(
      "summary",
      {},
      make("b", { text: whole.format(those.length) }),
      make("code", { text: code || "without a code" }),
      make("span", { text: reasons[0][0] }),
    );
    $("codes").append(
      make(
        "details",
        { class: "code" },
        summary,
        make("ul", {}, ...reasons.slice(0, SENTENCES).map(reason), more),
        all,
      ),
    );
  }
  if (groups.length === 1) $("codes").firstChild.open = true;
}

function drawFigures() {
  $("about").textContent = `${about.what}, ${moment(about.written)}`;
  for (const { name, value, bad } of figures)
    $("figures").append(
      make("div", { class: bad ? "bad" : "" }, make("dt", { text: name }), make("dd", { text: value })),
    );
}

const THEMES = { "": "◐ auto", light: "○ light", dark: "● dark" };
function theme(chosen) {
  document.documentElement.dataset.theme = chosen;
  $("theme").textContent = THEMES[chosen];
  try {
    localStorage.setItem("text2img-theme", chosen);
  } catch {
    // a browser that keeps nothing for files: it begins as the system's each time
  }
}

function remembered() {
  try {
    const kept = localStorage.getItem("text2img-theme");
    return kept in THEMES ? kept : "";
  } catch {
    return "";
  }
}

$("theme").addEventListener("click", () => {
  const names = Object.keys(THEMES);
  theme(names[(names.indexOf(document.documentElement.dataset.theme) + 1) % names.length]);
});
document.addEventListener("keydown", (event) => {
  const writing = event.target.matches("input, select, textarea");
  if (event.key === "/" && !writing && !$("details").open) {
    event.preventDefault();
    $("find").focus();
  }
});

function drawParts() {
  const parts = [
    ["failures", "What failed"],
    ["runs", "Runs"],
    ["pictures", "Images"],
  ].filter(([id]) => !$(id).hidden);
  $("parts").append(...parts.map(([id, text]) => make("a", { href: `#${id}`, text })));
  $("parts").addEventListener("click", (event) => {
    if (event.target.hash === "#runs") $("runs").open = true;
  });
}

theme(remembered());
drawFigures();
drawFailures();
prepareRuns();
drawParts();
prepareGallery();
prepareDetails();
fit();
show();
resized.observe($("grid"));
document.documentElement.dataset.ready = "yes";
