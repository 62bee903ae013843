/* Elements of one image. Names from outside only ever become text nodes. */

function element(tag, properties = {}, ...children) {
  const made = Object.assign(document.createElement(tag), properties);
  made.append(...children.filter((child) => child !== null));
  return made;
}

function svg(tag, attributes, ...children) {
  const made = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const name in attributes) made.setAttribute(name, attributes[name]);
  made.append(...children);
  return made;
}

const text = (value) => element("bdi", { textContent: value });

/* The pictures wait as text; an <img> is made when a card is shown. */
function pictureOf(card) {
  const found = document.getElementById(`picture-${card.number}`);
  return found ? JSON.parse(found.textContent) : null;
}

const image = (content, name, alt) =>
  element("img", { loading: "lazy", decoding: "async", className: name, alt, src: "data:image/webp;base64," + content });

function stage(card, picture) {
  const [width, height] = picture.size;
  const drawing = svg("svg", { viewBox: `0 0 ${width} ${height}`, "aria-hidden": "true" });
  for (const name of ["mask", "truth"]) {
    if (picture[name]) drawing.append(svg("path", { class: "halo layer-" + name, d: picture[name] }));
    if (picture[name]) drawing.append(svg("path", { class: "layer-" + name, d: picture[name] }));
  }
  if (picture.top) {
    const [x, y, w, h] = picture.top.box;
    drawing.append(svg("rect", { class: "layer-box", x, y, width: w, height: h }));
  }
  const made = element("div", { className: "stage" }, drawing);
  made.style.aspectRatio = `${width} / ${height}`;
  made.style.setProperty("--shape", width / height);
  if (picture.heat) made.prepend(image(picture.heat, "layer-heat", ""));
  if (picture.image) made.prepend(image(picture.image, "photo", `${card.category}, ${card.name}`));
  else made.classList.add("gone");
  return made;
}

function nothing(text) {
  return element("div", { className: "stage gone" }, element("p", {}, element("bdi", { textContent: text })));
}

const several = new Set(cards.map((card) => card.category)).size > 1;
const badge = (text, kind) => element("span", { className: "badge " + kind }, element("bdi", { textContent: text }));

function badges(card) {
  const category = several ? badge(card.category, "") : null;
  const label = card.label === null ? badge("unlabelled", "") : badge(card.label, card.label === "good" ? "good" : "defect");
  const row = element("p", { className: "badges" }, category, label);
  if (card.failure) row.append(badge("failed", "wrong"));
  else if (card.judgement === "missed" || card.judgement === "false alarm") row.append(badge(card.judgement, "wrong"));
  else if (card.anomalous !== null) row.append(badge(card.anomalous ? "anomalous" : "normal", ""));
  return row;
}

const number = (value) => (value === null || value === undefined ? "-" : value.toPrecision(4));

/* Where a score lies: the tick in the middle is the threshold. */
function meter(card) {
  if (!card.threshold || card.score === null) return null;
  const share = Math.max(0, Math.min(1, card.score / card.threshold / 2));
  const bar = element("span", { className: card.anomalous ? "meter over" : "meter" }, element("i"));
  bar.firstChild.style.width = `${100 * share}%`;
  bar.title = `score ${number(card.score)}, threshold ${number(card.threshold)}`;
  return bar;
}

function cardOf(card, href) {
  const picture = pictureOf(card);
  const wrong = card.failure || card.judgement === "missed" || card.judgement === "false alarm";
  const shown = picture ? stage(card, picture) : nothing(card.failure ? card.failure.message : "no pictures");
  if (picture && !picture.image) shown.append(element("p", { textContent: "image not found" }));
  const link = element(
    "a",
    { className: wrong ? "card wrong" : "card", href },
    shown,
    element("p", { className: "line" },
      element("span", { className: "name", title: card.name }, text(card.name.split("/").at(-1))),
      element("b", { textContent: card.score === null ? "" : number(card.score) })),
    meter(card),
    badges(card),
  );
  link.dataset.image = card.id;
  return element("li", {}, link);
}

function fact(name, ...values) {
  return element("div", {}, element("dt", { textContent: name }), element("dd", {}, ...values));
}

function tile(content, note, caption) {
  const inside = content ? element("div", { className: "tile" }, image(content, "", "")) : nothing(note);
  if (!content) inside.className = "tile gone";
  return element("figure", {}, inside, element("figcaption", {}, ...caption));
}

function matchOf(top) {
  const turned = top.match.rotation ? `, image turned by ${top.match.rotation}\u00b0` : "";
  return element(
    "div",
    { className: "match" },
    tile(top.patch, "The image is not there.", [
      element("strong", { textContent: "most anomalous patch" }), ` row ${top.row}, column ${top.col}, distance ${number(top.distance)}`,
    ]),
    tile(top.match.patch, top.match.note, [
      element("strong", { textContent: "nearest reference patch" }), ` row ${top.match.row}, column ${top.match.col} of `,
      text(top.match.name ?? top.match.id), turned,
    ]),
  );
}

function heatScale(card) {
  const [low, full] = data.scales[card.category];
  const bar = document.getElementById("heat-bar").content.cloneNode(true);
  return element("div", { className: "scale" }, element("span", { textContent: number(low) }), bar,
    element("span", { textContent: number(full) }));
}

function detailOf(card) {
  const picture = pictureOf(card);
  const facts = element("dl", { className: "facts" },
    fact("category", text(card.category)),
    fact("label", text(card.label ?? "unlabelled")));
  if (card.failure) {
    facts.append(fact("failed in", text(card.failure.stage)), fact(card.failure.type, text(card.failure.message)));
  } else {
    const verdict = card.anomalous === null ? "no threshold" : card.anomalous ? "anomalous" : "normal";
    const wrong = card.judgement === "missed" || card.judgement === "false alarm" ? ` (${card.judgement})` : "";
    facts.append(fact("score", element("b", { textContent: number(card.score) })),
      fact("threshold", number(card.threshold)), fact("judged", verdict + wrong));
    if (card.foreground !== null) facts.append(fact("foreground", `${Math.round(100 * card.foreground)} % of the patches`));
    if (picture?.heat) facts.append(fact("heat", heatScale(card)));
  }
  facts.append(fact("file", text(card.uri)), fact("image_id", text(card.id)));
  const side = element("div", { className: "side" }, facts);
  if (picture?.top) side.append(matchOf(picture.top));
  for (const note of picture?.notes ?? []) side.append(element("p", { className: "notice" }, text(note)));
  const shown = picture ? stage(card, picture) : nothing(card.failure ? card.failure.message : "no pictures");
  return element("div", { className: "detail" }, element("div", { className: "large" }, shown), side);
}
