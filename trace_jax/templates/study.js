"use strict";
const data = JSON.parse(document.getElementById("data").textContent);
const place = "trace_jax-study-" + data.study;
const get = (id) => document.getElementById(id);
let state = {rater: "", voter: "", at: 0, votes: {}}; // voter: whose votes these are, if known
try {
  const kept = JSON.parse(localStorage.getItem(place) || "null");
  if (kept && typeof kept.votes === "object") state = {...state, ...kept};
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

const rater = () => state.rater.trim();
const voted = () => data.items.filter((i) => i.id in state.votes).length;
const votes = (n) => n + (n === 1 ? " vote" : " votes");
// Somebody else's name stands by the votes: whose they are has to be said before they are saved.
const isOther = () => voted() > 0 && state.voter !== "" && rater() !== state.voter;

function own() {
  if (voted() && !state.voter) state.voter = rater();
}

function advice(done) {
  const n = data.items.length;
  if (!done) return "Nothing to save yet: vote on a prompt first.";
  const all = done === n ? "All " + n + " voted: " : done + " of " + n + " voted. ";
  if (!rater()) return all + (done === n ? "enter" : "Enter") + " your name and save the file.";
  if (isOther()) return "Say first whose votes these are: they were cast as " + state.voter + ".";
  return all + (done === n ? "save the file." : "Save the file when you are done.");
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
  const done = voted();
  get("count").textContent = (state.at + 1) + " of " + data.items.length + ", " + done + " voted";
  get("bar").value = done;
  get("back").disabled = state.at === 0;
  get("next").disabled = state.at === data.items.length - 1;
  get("save").disabled = done === 0 || !rater() || isOther();
  get("anew").disabled = done === 0;
  if (get("why").textContent !== advice(done)) get("why").textContent = advice(done);
}

function vote(choice) {
  if (isOther()) return ask();
  const before = voted();
  state.votes[data.items[state.at].id] = choice;
  own();
  if (state.at < data.items.length - 1) state.at += 1;
  keep();
  show();
  if (before < voted() && voted() === data.items.length) get("why").scrollIntoView({block: "center"});
}

// Start anew? Asked by its button, and where the name is no longer that of the votes.
function ask() {
  if (get("ask").open) return;
  const other = isOther();
  get("asked").textContent = !other
    ? "This deletes " + votes(voted()) + (state.voter ? " of " + state.voter : "") + " from this browser. A file that was saved stays."
    : "This browser has " + votes(voted()) + " that were cast as " + state.voter + ". If you are someone else, start anew: this deletes them here; a file that was saved stays.";
  get("same").textContent = other ? "I am the same person: keep the votes" : "Keep the votes";
  get("ask").showModal();
}

function anew() {
  if (!isOther()) state.rater = "";
  state = {...state, voter: "", at: 0, votes: {}};
  get("ask").close();
  keep();
  settle();
  window.scrollTo(0, 0);
}

function same() {
  if (rater()) state.voter = rater();
  get("ask").close();
  keep();
  settle();
}

function settle() {
  if (isOther()) state.rater = state.voter; // nobody said that they are someone else
  get("rater").value = state.rater;
  show();
}

function go(step) {
  state.at = Math.min(data.items.length - 1, Math.max(0, state.at + step));
  keep();
  show();
}

function save() {
  if (isOther()) return ask();
  const text = JSON.stringify({study: data.study, rater: rater(), votes: state.votes}, null, 2);
  const link = document.createElement("a");
  link.href = URL.createObjectURL(new Blob([text], {type: "application/json"}));
  link.download = "votes-" + data.study + "-" + (rater().replace(/[^\w-]+/g, "_") || "rater") + ".json";
  link.click();
  URL.revokeObjectURL(link.href);
}

data.items[0].answers.forEach((_, k) => get("card-" + k).addEventListener("click", () => vote(k)));
get("tie").addEventListener("click", () => vote("tie"));
get("back").addEventListener("click", () => go(-1));
get("next").addEventListener("click", () => go(1));
get("save").addEventListener("click", save);
get("anew").addEventListener("click", ask);
get("start").addEventListener("click", anew);
get("same").addEventListener("click", same);
get("ask").addEventListener("cancel", () => {
  settle();
  keep();
});
get("rater").addEventListener("input", (event) => {
  state.rater = event.target.value;
  keep();
  show();
});
get("rater").addEventListener("change", () => {
  own();
  keep();
  if (isOther()) ask();
});
document.addEventListener("keydown", (event) => {
  if (get("ask").open || event.target.tagName === "INPUT" || event.ctrlKey || event.metaKey || event.altKey) return;
  const k = Number(event.key) - 1;
  if (k >= 0 && k < data.items[0].answers.length) vote(k);
  else if (event.key === "0") vote("tie");
  else if (event.key === "ArrowLeft") go(-1);
  else if (event.key === "ArrowRight") go(1);
  else return;
  event.preventDefault();
});
own();
get("rater").value = state.rater;
show();
if (isOther()) ask();
else if (voted()) get("saved").textContent = "Kept in this browser: " + votes(voted()) + (state.voter ? " of " + state.voter : "") + ". If they are not yours, start anew.";
