"use strict";
const data = JSON.parse(document.getElementById("data").textContent);
const place = "trace_jax-study-" + data.study;
const get = (id) => document.getElementById(id);
let state = {rater: "", at: 0, votes: {}};
try {
  const kept = JSON.parse(localStorage.getItem(place) || "null");
  if (kept && typeof kept.votes === "object") state = kept;
} catch (error) {
  get("saved").textContent = "This browser keeps nothing: save the votes before you close the page.";
}

function keep() {
  try {
    localStorage.setItem(place, JSON.stringify(state));
    get("saved").textContent = "Kept in this browser.";
  } catch (error) {
    get("saved").textContent = "This browser keeps nothing: save the votes before you close the page.";
  }
}

function show() {
  const item = data.items[state.at];
  const vote = state.votes[item.id];
  get("prompt").textContent = item.prompt;
  item.answers.forEach((text, k) => {
    get("answer-" + k).textContent = text;
    get("card-" + k).setAttribute("aria-pressed", String(vote === k));
  });
  get("tie").setAttribute("aria-pressed", String(vote === "tie"));
  const done = data.items.filter((i) => i.id in state.votes).length;
  get("count").textContent = (state.at + 1) + " of " + data.items.length + ", " + done + " voted";
  get("bar").value = done;
  get("back").disabled = state.at === 0;
  get("next").disabled = state.at === data.items.length - 1;
  get("save").disabled = done === 0 || !state.rater.trim();
}

function vote(choice) {
  state.votes[data.items[state.at].id] = choice;
  if (state.at < data.items.length - 1) state.at += 1;
  keep();
  show();
}

function go(step) {
  state.at = Math.min(data.items.length - 1, Math.max(0, state.at + step));
  keep();
  show();
}

function save() {
  const text = JSON.stringify({study: data.study, rater: state.rater.trim(), votes: state.votes}, null, 2);
  const link = document.createElement("a");
  link.href = URL.createObjectURL(new Blob([text], {type: "application/json"}));
  link.download = "votes-" + data.study + "-" + (state.rater.trim().replace(/[^\w-]+/g, "_") || "rater") + ".json";
  link.click();
  URL.revokeObjectURL(link.href);
}

data.items[0].answers.forEach((_, k) => get("card-" + k).addEventListener("click", () => vote(k)));
get("tie").addEventListener("click", () => vote("tie"));
get("back").addEventListener("click", () => go(-1));
get("next").addEventListener("click", () => go(1));
get("save").addEventListener("click", save);
get("rater").value = state.rater;
get("rater").addEventListener("input", (event) => {
  state.rater = event.target.value;
  keep();
  show();
});
document.addEventListener("keydown", (event) => {
  if (event.target.tagName === "INPUT" || event.ctrlKey || event.metaKey || event.altKey) return;
  const k = Number(event.key) - 1;
  if (k >= 0 && k < data.items[0].answers.length) vote(k);
  else if (event.key === "0") vote("tie");
  else if (event.key === "ArrowLeft") go(-1);
  else if (event.key === "ArrowRight") go(1);
  else return;
  event.preventDefault();
});
show();
