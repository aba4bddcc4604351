// The grid: a card for each item that the filters let through, in the order that was chosen. It stands in
// blocks of some rows: to watch every card would cost more than to draw those in view.
const AT_ONCE = 2400; // cards; more come by a button
const ROWS = 4; // in a block
const WIDTH = 184; // pixels of a card, at the least
const TALL = 1.31; // a card's height for its width, as page.css has it
const MARGIN = "900px 0px"; // how far from the window thumbnails are loaded, and let go again
const cards = new Map();
let shown = items;
let reach = AT_ONCE;
let across = 1;

const near = new IntersectionObserver(
  (entries) => {
    for (const { target, isIntersecting } of entries) {
      for (const image of target.getElementsByTagName("img")) {
        if (isIntersecting) image.src ||= thumbnail(Number(image.dataset.number));
        else image.removeAttribute("src");
      }
    }
  },
  { rootMargin: MARGIN },
);

const resized = new ResizeObserver(() => {
  if (fit()) draw();
});

// How many cards stand in a row, and how tall they are; returns whether the first has changed.
function fit() {
  const gap = parseFloat(getComputedStyle($("grid")).getPropertyValue("--gap"));
  const width = $("grid").clientWidth;
  const least = matchMedia("(max-width: 700px)").matches ? 2 : 1;
  const fitting = Math.max(least, Math.floor((width + gap) / (WIDTH + gap)));
  $("grid").style.setProperty("--row", `${(TALL * (width - gap * (fitting - 1))) / fitting}px`);
  $("grid").style.setProperty("--across", fitting);
  const changed = fitting !== across;
  across = fitting;
  return changed;
}

function blocks(those) {
  const made = [];
  for (let start = 0; start < those.length; start += ROWS * across) {
    const block = make(
      "div",
      { class: "block", role: "none" },
      ...those.slice(start, start + ROWS * across).map(card),
    );
    block.style.setProperty("--rows", Math.ceil(block.childElementCount / across));
    made.push(block);
  }
  return made;
}

function marks(item) {
  const labels = [];
  if (item.pictures?.length > 1) labels.push(`×${item.pictures.length}`);
  if (item.tries?.length > 1) labels.push(plural(item.tries.length, "try", "tries"));
  if (best(item) !== null) labels.push(best(item).toFixed(2));
  if (item.pictures?.[0]?.size) labels.push(item.pictures[0].mark ?? "no mark");
  return make("span", { class: "marks" }, ...labels.map((text) => make("span", { class: "mark", text })));
}

function card(item) {
  if (cards.has(item)) return cards.get(item);
  const inside = failed(item) ? absent(item.code, item.sentence) : picture(item.pictures[0], true);
  const button = make(
    "button",
    { type: "button", class: failed(item) ? "card failed" : "card", tabindex: "-1" },
    make("span", { class: "picture" }, inside, failed(item) ? null : marks(item)),
    make("span", { class: "text", text: item.text || "(no text)" }),
  );
  button.item = item;
  const cell = make("div", { role: "listitem" }, button);
  cards.set(item, cell);
  return cell;
}

const ORDERS = {
  newest: ["newest first", (a, b) => (b.at ?? "").localeCompare(a.at ?? "")],
  oldest: ["oldest first", (a, b) => (a.at ?? "~").localeCompare(b.at ?? "~")],
  best: ["best score first", (a, b) => (best(b) ?? -1) - (best(a) ?? -1)],
  worst: ["worst score first", (a, b) => (best(a) ?? 2) - (best(b) ?? 2)],
  text: ["by prompt", (a, b) => a.text.localeCompare(b.text)],
};

function admits() {
  const words = $("find").value.toLowerCase().split(/\s+/).filter(Boolean);
  const [status, dataset, run, model] = ["status", "dataset", "run", "model"].map((id) => $(id).value);
  const score = Number($("score").value) || 0;
  return (item) =>
    (!status ||
      (status === "completed"
        ? !failed(item)
        : status === "error"
          ? failed(item)
          : `code ${item.code}` === status)) &&
    (!dataset || `= ${item.dataset ?? ""}` === dataset) &&
    (!run || `= ${item.run ?? ""}` === run) &&
    (!model || `= ${item.used?.model ?? ""}` === model) &&
    (!score || (best(item) ?? -1) >= score) &&
    words.every((word) => searched(item).includes(word));
}

function searched(item) {
  item.searched ??= [
    item.text,
    item.id,
    item.used?.negative_prompt,
    item.sentence,
    item.code,
    item.evaluation?.missing?.join?.(" "),
  ]
    .filter((text) => typeof text === "string")
    .join("\n")
    .toLowerCase();
  return item.searched;
}

function show() {
  shown = items.filter(admits()).sort(ORDERS[$("order").value][1]);
  reach = AT_ONCE;
  draw();
  drawRuns();
}

function draw() {
  const now = shown.slice(0, reach);
  near.disconnect();
  for (const block of $("grid").children)
    for (const image of block.getElementsByTagName("img")) image.removeAttribute("src");
  $("grid").replaceChildren(...blocks(now));
  for (const block of $("grid").children) near.observe(block);
  rove(now.length ? cards.get(now[0]).firstChild : null);
  const unread = items.some((item) => item.pictures?.some((each) => each.thumbnail === undefined));
  $("count").textContent =
    (shown.length === items.length
      ? `${whole.format(items.length)} shown`
      : `${whole.format(shown.length)} of ${whole.format(items.length)} shown`) +
    (unread ? "; some images could not be read and show the reason" : "");
  const left = Math.min(AT_ONCE, shown.length - reach);
  $("further").hidden = left <= 0;
  $("further").textContent = `Show ${whole.format(left)} more`;
}

// One card is in the order of the Tab key; the arrow keys move among them.
let roving = null;
function rove(button) {
  if (roving) roving.tabIndex = -1;
  roving = button;
  if (roving) roving.tabIndex = 0;
}

function step(key) {
  const by = {
    ArrowRight: 1,
    ArrowLeft: -1,
    ArrowDown: across,
    ArrowUp: -across,
    Home: -Infinity,
    End: Infinity,
  }[key];
  if (by === undefined) return false;
  const last = Math.min(reach, shown.length) - 1;
  const to = Math.max(0, Math.min(last, shown.indexOf(document.activeElement.item) + by));
  cards.get(shown[to]).firstChild.focus();
  return true;
}

// An option for each value there is, with how many have it.
function options(pairs) {
  const counts = new Map();
  for (const [value, label] of pairs) counts.set(value, [label, (counts.get(value)?.[1] ?? 0) + 1]);
  const sorted = [...counts].sort((a, b) => a[1][0].localeCompare(b[1][0], "en", { numeric: true }));
  return sorted.map(([value, [label, count]]) =>
    make("option", { value, text: `${label} (${whole.format(count)})` }),
  );
}

function choose(id, value) {
  $(id).value = $(id).value === value ? "" : value;
  show();
}

function prepareGallery() {
  const offer = (id, ...more) => $(id).append(make("option", { value: "", text: "all" }), ...more);
  const of = (read) => options(items.map((item) => [`= ${read(item) ?? ""}`, plainly(read(item) ?? "none")]));
  offer("dataset", ...of((item) => item.dataset));
  offer("run", ...of((item) => item.run));
  offer("model", ...of((item) => item.used?.model));
  const codes = options(
    items.filter(failed).map((item) => [`code ${item.code}`, item.code || "without a code"]),
  );
  const reasons = codes.length ? make("optgroup", { label: "failed, by code" }, ...codes) : null;
  offer(
    "status",
    ...options(items.map((item) => (failed(item) ? ["error", "failed"] : ["completed", "completed"]))),
  );
  if (reasons) $("status").append(reasons);
  for (const [value, [text]] of Object.entries(ORDERS)) $("order").append(make("option", { value, text }));
  $("score").closest("label").hidden = !items.some((item) => best(item) !== null);

  let waiting;
  $("find").addEventListener("input", () => {
    clearTimeout(waiting);
    waiting = setTimeout(show, 90);
  });
  for (const id of ["status", "dataset", "run", "model", "score", "order"])
    $(id).addEventListener("input", show);
  $("clear").addEventListener("click", () => {
    for (const id of ["find", "status", "dataset", "run", "model", "score"]) $(id).value = "";
    show();
    $("find").focus();
  });
  $("more").addEventListener("click", () => {
    const open = $("narrow").classList.toggle("open");
    $("more").setAttribute("aria-expanded", String(open));
  });
  $("further").addEventListener("click", () => {
    const first = reach;
    reach += AT_ONCE;
    draw();
    cards.get(shown[first])?.firstChild.focus();
  });
  $("grid").addEventListener("click", (event) => {
    const button = event.target.closest(".card");
    if (button) open(button.item);
  });
  $("grid").addEventListener("focusin", (event) => rove(event.target));
  $("grid").addEventListener("keydown", (event) => {
    if (!event.altKey && !event.ctrlKey && !event.metaKey && step(event.key)) event.preventDefault();
  });
}
