/* Wiring: the form, the pages of cards, the dialog, the keyboard, the address. */

const form = document.getElementById("filters");
const list = document.getElementById("cards");
const dialog = document.getElementById("detail");
let state = stateOf(isState(location.hash) ? location.hash : "");

function options(select, names) {
  select.append(element("option", { value: "", textContent: "all" }));
  for (const name of names) select.append(element("option", { value: name, textContent: name }));
}

const distinct = (name) => [...new Set(cards.map((card) => card[name]).filter((value) => value !== null))].sort();
options(form.elements.category, distinct("category"));
options(form.elements.label, distinct("label"));

for (const option of form.elements.show) option.disabled = !cards.some(SHOWN[option.value]);

function change(changes, { step = false } = {}) {
  state = { ...state, ...changes };
  history[step ? "pushState" : "replaceState"](null, "", hashOf(state));
  render();
}

function render() {
  for (const name of ["category", "label", "show", "sort", "q"]) {
    const field = form.elements[name];
    if (field.value !== state[name]) field.value = state[name];
  }
  const found = selected(state);
  const pages = Math.max(1, Math.ceil(found.length / PAGE_SIZE));
  const page = Math.min(pages, Math.max(1, Number.parseInt(state.page, 10) || 1));
  showCards(found, page);
  document.getElementById("count").textContent =
    `${found.length} of ${cards.length} images` + (pages > 1 ? `, page ${page} of ${pages}` : "");
  for (const place of document.querySelectorAll(".pages")) showPages(place, page, pages);
  showDetail(found);
}

let drawn = "";
function showCards(found, page) {
  const shown = found.slice((page - 1) * PAGE_SIZE, page * PAGE_SIZE);
  const links = hashOf({ ...state, image: "" }); // a card's address holds the filters, too
  const key = [links, ...shown.map((card) => card.number)].join();
  if (key === drawn) return; // the dialog opened or closed: keep the elements, and with them the focus
  drawn = key;
  list.replaceChildren(...shown.map((card) => cardOf(card, hashOf({ ...state, image: card.id }))));
  if (!shown.length) list.append(element("li", { className: "empty", textContent: "No image fits these filters." }));
}

function showPages(place, page, pages) {
  place.hidden = pages === 1;
  const go = (to, name, sign) =>
    element("button", { type: "button", disabled: to < 1 || to > pages, ariaLabel: name, textContent: sign,
      onclick: () => turn(to, place) });
  const choice = element("select", { ariaLabel: "Page", onchange: () => turn(Number(choice.value), place) });
  for (let each = 1; each <= pages; each += 1) {
    choice.append(element("option", { value: each, textContent: `page ${each} of ${pages}`, selected: each === page }));
  }
  place.replaceChildren(go(page - 1, "Previous page", "\u2190"), choice, go(page + 1, "Next page", "\u2192"));
}

function turn(page, place) {
  const lower = place !== document.querySelector(".pages");
  change({ page: String(page) });
  if (lower) document.getElementById("images").scrollIntoView();
}

let opened = "";
function showDetail(found) {
  const card = state.image ? cards.find((each) => each.id === state.image) : null;
  if (!state.image) {
    opened = "";
    if (dialog.open) dialog.close();
    return;
  }
  if (opened !== state.image) {
    document.getElementById("detail-name").replaceChildren(text(card ? card.name : state.image));
    const missing = nothing("This image has no card in this report.");
    document.getElementById("detail-body").replaceChildren(card ? detailOf(card) : missing);
  }
  opened = state.image;
  const place = found.findIndex((each) => each.id === state.image);
  for (const button of dialog.querySelectorAll("[data-step]")) {
    const next = found[place + Number(button.dataset.step)];
    button.disabled = place < 0 || !next;
    button.onclick = () => change({ image: next.id, page: String(1 + Math.floor(found.indexOf(next) / PAGE_SIZE)) });
  }
  if (!dialog.open) dialog.showModal();
}

const LAYERS = { h: "heat", m: "mask", g: "truth" };
function toggle(layer, on) {
  document.documentElement.classList.toggle("no-" + layer, !on);
  for (const box of document.querySelectorAll(`[data-layer="${layer}"]`)) box.checked = on;
}

form.addEventListener("input", (event) => change({ [event.target.name]: event.target.value, page: "1" }));
form.addEventListener("submit", (event) => event.preventDefault());
form.addEventListener("reset", (event) => {
  event.preventDefault();
  change({ ...DEFAULTS });
});
document.addEventListener("change", (event) => {
  if (event.target.dataset.layer) toggle(event.target.dataset.layer, event.target.checked);
});
document.getElementById("opacity").addEventListener("input", (event) => {
  document.documentElement.style.setProperty("--heat", event.target.value);
});
document.addEventListener("click", (event) => {
  const link = event.target.closest("a.filter");
  const card = event.target.closest("a.card");
  const plain = !(event.ctrlKey || event.metaKey || event.shiftKey || event.button);
  if (link && plain) {
    event.preventDefault();
    change({ ...DEFAULTS, category: link.dataset.category });
    document.getElementById("images").scrollIntoView();
  } else if (card && plain) {
    event.preventDefault();
    change({ image: card.dataset.image }, { step: true });
  }
});
for (const link of document.querySelectorAll("a.filter")) link.href = hashOf({ ...DEFAULTS, category: link.dataset.category });

dialog.querySelector("[data-close]").addEventListener("click", () => dialog.close());
dialog.addEventListener("click", (event) => event.target === dialog && dialog.close());
dialog.addEventListener("close", () => {
  const last = state.image;
  if (last) change({ image: "" });
  const card = [...list.querySelectorAll("a.card")].find((each) => each.dataset.image === last);
  if (card && !form.contains(document.activeElement)) card.focus(); // by then the next key may have gone to the search
});

document.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  const writing = event.target.matches("input[type=search], select, input[type=range]");
  const step = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
  if (step && dialog.open) dialog.querySelector(`[data-step="${step}"]`).click();
  else if (step && event.target.matches("a.card")) {
    const next = event.target.parentElement[step < 0 ? "previousElementSibling" : "nextElementSibling"];
    next?.firstElementChild?.focus();
  } else if (!writing && event.key === "/" && !dialog.open) {
    event.preventDefault();
    form.elements.q.focus();
  } else if (!writing && LAYERS[event.key]) {
    toggle(LAYERS[event.key], document.documentElement.classList.contains("no-" + LAYERS[event.key]));
  }
});

addEventListener("hashchange", () => {
  if (!isState(location.hash)) return; // a link to a section
  state = stateOf(location.hash);
  render();
});
addEventListener("popstate", () => isState(location.hash) && ((state = stateOf(location.hash)), render()));

render();
document.documentElement.dataset.ready = "true";
