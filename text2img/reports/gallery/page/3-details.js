// What is known of one item, in a dialog; the arrow keys go on to the next.
let current = null;

const NAMES = {
  seed: "seed",
  num_inference_steps: "steps",
  guidance_scale: "guidance",
  scheduler: "scheduler",
  model: "model",
  negative_prompt: "negative",
  artist_name: "artist",
  feature_cache: "feature cache",
};

function rows(pairs) {
  const known = pairs.filter(([, value]) => value !== null && value !== undefined && value !== "");
  const cells = known.flatMap(([name, value]) => [
    make("dt", { text: name }),
    make("dd", { text: plainly(value) }),
  ]);
  return make("dl", {}, ...cells);
}

const plainly = (value) => (typeof value === "object" ? JSON.stringify(value) : String(value));

function parameters(item) {
  const { width, height, ...used } = item.used ?? {};
  const named = Object.entries(used).map(([name, value]) => [
    NAMES[name] ?? name.replaceAll("_", " "),
    value,
  ]);
  return [["size", width && height ? `${width} × ${height}` : null], ...named];
}

function judged(evaluation) {
  const listed = (phrases) => (Array.isArray(phrases) ? phrases.join(", ") : phrases);
  return [
    ["by", evaluation.evaluator],
    ["matches", listed(evaluation.matches)],
    ["missing", listed(evaluation.missing)],
    ["suggests", evaluation.better_prompt],
    ["not judged", evaluation.error],
  ];
}

function large(shown) {
  const view = make("div", { class: "large" }, picture(shown, false));
  if (shown?.size) view.firstChild.setAttribute("alt", current.text);
  if (!shown) return view;
  const mark = shown.mark ? `marked by ${shown.mark}` : "no mark of its making";
  const size = shown.size ? `${shown.size[0]} × ${shown.size[1]}, ${mark}: ` : "";
  return make(
    "div",
    {},
    view,
    make("p", { class: "link" }, `Original, ${size}`, link(shown.url, shown.href)),
  );
}

function attempt(each) {
  const score = typeof each.score === "number" ? each.score.toFixed(2) : "unscored";
  const title = `${each.iteration ? `iteration ${each.iteration}, ` : ""}${score}`;
  return make(
    "li",
    { class: each.best ? "best" : "" },
    make("div", { class: "picture" }, picture(each.picture, false)),
    make(
      "p",
      {},
      make("b", { text: each.best ? `★ ${title}` : title }),
      each.prompt && each.prompt !== current.text ? make("br") : null,
      each.prompt && each.prompt !== current.text ? each.prompt : null,
    ),
    each.picture?.href ? make("p", {}, link("original", each.picture.href)) : null,
  );
}

function left(item) {
  if (failed(item)) return make("div", { class: "large" }, absent(item.code, item.sentence, "failed"));
  return make("div", {}, ...(item.pictures.length ? item.pictures : [null]).map(large));
}

function right(item) {
  const scores = (item.scores ?? []).map((score) => (score === null ? "–" : score.toFixed(2))).join(", ");
  const known = [
    ["status", failed(item) ? `failed: ${item.code}` : "completed"],
    ["reason", item.sentence],
    ["attempts", failed(item) ? item.attempts : null],
    ["score", scores],
    ["iterations", item.iterations],
    ["id", item.id],
    ["data set", item.dataset],
    ["run", item.run],
    [failed(item) ? "failed" : "completed", moment(item.at)],
  ];
  const parts = [
    make("p", { class: "prompt", id: "details-title", text: item.text || "(no text)" }),
    make("h3", { text: "What became of it" }),
    rows(known),
  ];
  if (item.used) parts.push(make("h3", { text: "Parameters" }), rows(parameters(item)));
  if (item.evaluation) parts.push(make("h3", { text: "The evaluator" }), rows(judged(item.evaluation)));
  if (item.tries?.length)
    parts.push(make("h3", { text: "Tries" }), make("ul", { class: "tries" }, ...item.tries.map(attempt)));
  return make("div", {}, ...parts);
}

function open(item) {
  current = item;
  $("body").replaceChildren(left(item), right(item));
  const place = shown.indexOf(item);
  $("place").textContent = place < 0 ? "" : `${whole.format(place + 1)} of ${whole.format(shown.length)}`;
  $("previous").disabled = place <= 0;
  $("next").disabled = place < 0 || place === shown.length - 1;
  if (!$("details").open) $("details").showModal();
  $("details").focus(); // and no button: Enter would press it
  $("details").scrollTop = 0;
}

function turn(by) {
  const next = shown[shown.indexOf(current) + by];
  if (next && shown.includes(current)) open(next);
}

function prepareDetails() {
  $("previous").addEventListener("click", () => turn(-1));
  $("next").addEventListener("click", () => turn(1));
  $("close").addEventListener("click", () => $("details").close());
  $("details").addEventListener("click", (event) => {
    if (event.target === $("details")) $("details").close(); // beside it
  });
  $("details").addEventListener("keydown", (event) => {
    if (event.altKey || event.ctrlKey || event.metaKey) return;
    if (event.key === "ArrowLeft") turn(-1);
    if (event.key === "ArrowRight") turn(1);
  });
  $("details").addEventListener("close", () => {
    $("body").replaceChildren();
    const cell = cards.get(current);
    if (cell?.isConnected) cell.firstChild.focus(); // the one that was looked at last
  });
}
