"use strict";
/* What is shown: read from the address after "#", filtered and sorted. Nothing here touches the page. */

const data = JSON.parse(document.getElementById("data").textContent);
const cards = data.cards.map((card, number) => ({ ...card, number }));
const PAGE_SIZE = 24;
const DEFAULTS = { category: "", label: "", show: "all", sort: "highest", q: "", page: "1", image: "" };

function stateOf(hash) {
  const given = new URLSearchParams(hash.replace(/^#/, ""));
  const state = {};
  for (const name in DEFAULTS) state[name] = given.get(name) ?? DEFAULTS[name];
  return state;
}

function hashOf(state) {
  const given = new URLSearchParams();
  for (const name in DEFAULTS) if (state[name] !== DEFAULTS[name]) given.set(name, state[name]);
  return "#" + (given.toString() || "all=");
}

const isState = (hash) => hash === "" || hash.includes("=");

const SHOWN = {
  all: () => true,
  wrong: (card) => card.judgement === "missed" || card.judgement === "false alarm",
  missed: (card) => card.judgement === "missed",
  alarm: (card) => card.judgement === "false alarm",
  anomalous: (card) => card.anomalous === true,
  normal: (card) => card.anomalous === false,
  unlabelled: (card) => !card.failure && card.label === null,
  failed: (card) => Boolean(card.failure),
};

const relative = (card) => (card.threshold ? card.score / card.threshold : null);
const distance = (card) => (card.threshold ? Math.abs(card.score / card.threshold - 1) : null);
const byName = (a, b) => a.name.localeCompare(b.name, undefined, { numeric: true });

/* Failed images, and those without the value, come last in every order. */
const by = (value, sign) => (a, b) => {
  const [first, second] = [a, b].map((card) => (card.score === null ? null : value(card)));
  if (first === null || second === null) return (first === null) - (second === null);
  return sign * (first - second);
};
const ORDERS = {
  highest: by((card) => card.score, -1),
  lowest: by((card) => card.score, 1),
  relative: by(relative, -1),
  nearest: by(distance, 1),
  name: byName,
};

function selected(state) {
  const words = state.q.toLowerCase();
  const shows = SHOWN[state.show] ?? SHOWN.all;
  return cards
    .filter((card) => !state.category || card.category === state.category)
    .filter((card) => !state.label || card.label === state.label)
    .filter(shows)
    .filter((card) => !words || `${card.uri} ${card.id}`.toLowerCase().includes(words))
    .sort((a, b) => (ORDERS[state.sort] ?? ORDERS.highest)(a, b) || a.number - b.number);
}
