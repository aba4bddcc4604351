// What the runs' documents say: how fast, where the time went, what it cost.
const DEVICE = ["load", "compile", "denoise", "decode", "wait"];
const BESIDE = ["claim", "encode", "upload", "evaluate", "record"];
const MOST = 80; // columns
const inTime = [...runs].sort((a, b) => (a.started ?? "").localeCompare(b.started ?? ""));

function took(run) {
  const seconds = run.finished ? (new Date(run.finished) - new Date(run.started)) / 1000 : null;
  if (seconds === null) return "–";
  return seconds < 90 ? `${seconds.toFixed(1)} s` : `${whole.format(Math.round(seconds / 60))} min`;
}

function drawPace(chosen) {
  const last = inTime.filter((run) => run.pace > 0).slice(-MOST); // the others found nothing to do
  const top = Math.max(...last.map((run) => run.pace), 0) || 1;
  const columns = last.map((run) => {
    const bar = make("i");
    bar.style.height = `${(88 * run.pace) / top}%`; // what is left is for the figure above it
    const label = `${run.id}: ${pace(run.pace)} images/s, ${moment(run.started)}, ${run.status}`;
    const figure = last.length <= 12 ? make("span", { text: pace(run.pace) }) : null;
    const pressed = String(chosen === `= ${run.id}`);
    return make(
      "button",
      {
        type: "button",
        title: label,
        "aria-label": label,
        "aria-pressed": pressed,
        onclick: () => choose("run", `= ${run.id}`),
      },
      figure,
      bar,
    );
  });
  $("pace").replaceChildren(...columns);
  $("pace").classList.toggle(
    "chosen",
    last.some((run) => chosen === `= ${run.id}`),
  );
  $("pace-scale").textContent = `the highest is ${pace(top)}; a bar chooses its run`;
  const ends = last.length > 1 ? [last[0], last.at(-1)] : last;
  $("pace-ends").textContent = ends.map((run) => moment(run.started)).join("  to  ");
}

function drawStages(chosen) {
  const one = inTime.filter((run) => chosen === `= ${run.id}`);
  const these = one.length ? one : inTime;
  $("stages-of").textContent =
    these.length === 1 ? `of run ${these[0].id}` : `of ${plural(these.length, "run", "runs")} together`;
  const total = (stage) => these.reduce((sum, run) => sum + (run.seconds[stage] ?? 0), 0);
  const others = [...new Set(these.flatMap((run) => Object.keys(run.seconds)))].filter(
    (stage) => ![...DEVICE, ...BESIDE].includes(stage),
  );
  const groups = [
    ["the device’s thread", "", DEVICE],
    ["beside it, all threads together", "beside", [...BESIDE, ...others]],
  ];
  const longest = Math.max(...groups.flatMap(([, , stages]) => stages.map(total))) || 1;
  const rows = groups.flatMap(([title, kind, stages]) => [
    make("span", { class: "head", text: title }),
    ...stages
      .filter((stage) => total(stage) > 0)
      .flatMap((stage) => {
        const bar = make("i", { class: kind });
        bar.style.width = `${(100 * total(stage)) / longest}%`;
        const seconds = total(stage);
        return [
          make("span", { text: stage }),
          bar,
          make("b", { text: `${seconds >= 100 ? whole.format(Math.round(seconds)) : seconds.toFixed(1)} s` }),
        ];
      }),
  ]);
  $("stages").replaceChildren(...rows);
}

function drawRuns() {
  if (!runs.length) return;
  drawPace($("run").value);
  drawStages($("run").value);
}

function prepareRuns() {
  if (!runs.length) return;
  $("runs").hidden = false;
  $("runs").open = !matchMedia("(max-width: 700px)").matches;
  const costs = runs.some((run) => run.dollars !== null);
  const columns = [
    ["run", (run) => run.id],
    ["started", (run) => moment(run.started)],
    ["took", took],
    ["status", (run) => run.status],
    ["model", (run) => run.model ?? "–"],
    ["completed", (run) => whole.format(run.completed), 1],
    ["failed", (run) => whole.format(run.failed), 1],
    ["images", (run) => whole.format(run.images), 1],
    ["images/s", (run) => pace(run.pace), 1],
    ["steady", (run) => (run.steady ? pace(run.steady) : "–"), 1],
    ["device busy", (run) => `${(100 * run.busy).toFixed(0)} %`, 1],
    ["peak memory", (run) => (run.memory ? `${(run.memory / 2 ** 30).toFixed(2)} GiB` : "–"), 1],
    ...(costs
      ? [["$ per 1,000 images", (run) => (run.dollars === null ? "–" : run.dollars.toFixed(2)), 1]]
      : []),
    ["host", (run) => run.host],
  ];
  const kind = (number) => ({ class: number ? "number" : "" });
  const head = make(
    "tr",
    {},
    ...columns.map(([name, , number]) => make("th", { ...kind(number), scope: "col", text: name })),
  );
  const lines = [...inTime]
    .reverse()
    .map((run) =>
      make("tr", {}, ...columns.map(([, read, number]) => make("td", { ...kind(number), text: read(run) }))),
    );
  $("table").append(make("thead", {}, head), make("tbody", {}, ...lines));
}
