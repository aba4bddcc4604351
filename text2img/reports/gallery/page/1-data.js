// What the file holds: items (finished prompts), thumbnails, runs. Text is only ever set as text.
const SIDE_BY_SIDE = 32; // thumbnails in a script, as page.py writes them
const KEPT = 24; // scripts of thumbnails that stay parsed
const $ = (id) => document.getElementById(id);
const parsed = (script) => JSON.parse(script.textContent);

const { about, figures, runs } = parsed($("summary"));
const items = [...document.querySelectorAll("script.items")].flatMap((script) => {
  const read = parsed(script);
  script.remove();
  return read;
});
const sheets = [...document.querySelectorAll("script.thumbnails")];
const opened = new Map();

function thumbnail(number) {
  const place = Math.floor(number / SIDE_BY_SIDE);
  const sheet = opened.get(place) ?? parsed(sheets[place]);
  opened.delete(place); // and in again, so that the one longest unused is the first
  opened.set(place, sheet);
  if (opened.size > KEPT) opened.delete(opened.keys().next().value);
  return sheet[number % SIDE_BY_SIDE];
}

function make(tag, properties, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(properties ?? {})) {
    if (name === "text") element.textContent = value;
    else if (name === "class") element.className = value;
    else if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else element.setAttribute(name, value);
  }
  element.append(...children.filter((child) => child !== null && child !== undefined));
  return element;
}

const whole = new Intl.NumberFormat("en");
const moments = new Intl.DateTimeFormat("en-GB", { dateStyle: "medium", timeStyle: "short" });
const moment = (text) => (text ? moments.format(new Date(text)) : "–");
const plural = (count, one, many) => `${whole.format(count)} ${count === 1 ? one : many}`;
const pace = (number) => (number >= 100 ? whole.format(Math.round(number)) : number.toFixed(2));
const best = (item) => item.scores?.find((score) => score !== null) ?? null;
const failed = (item) => item.code !== undefined;

// Only links that link_of found harmless are in the data; checked again before one becomes a link.
function link(url, href) {
  if (!href || !/^(https:\/\/|s3:\/\/|\.{1,2}\/)/.test(href))
    return make("span", { class: "mono", text: url });
  return make("a", { href, target: "_blank", rel: "noopener noreferrer", class: "mono", text: url });
}

function absent(title, reason, kind = "") {
  return make("div", { class: `absent ${kind}` }, make("b", { text: title }), make("span", { text: reason }));
}

// An image's thumbnail, or why there is none. `lazy` ones get theirs when they come into view.
function picture(shown, lazy) {
  if (shown?.thumbnail === undefined) return absent("No image", shown?.reason ?? "none is recorded");
  const image = make("img", { alt: "", decoding: "async" });
  if (lazy) image.dataset.number = shown.thumbnail;
  else image.src = thumbnail(shown.thumbnail);
  return image;
}
