// The tab that looks inside: asks for the page of the microscope and shows it in a frame
// of its own, which reaches nothing of this page.

import { $ } from "./dom.js";
import { post } from "./server.js";

const TABS = { "tab-chat": "talk", "tab-look": "look" };
let model = null;

// The tabs are there when the model can be looked into.
export function offer(one) {
  model = one;
  $("tabs").hidden = !one?.look;
  if (!one?.look && !$("look").hidden) open("tab-chat");
}

function open(name) {
  for (const [tab, panel] of Object.entries(TABS)) {
    const here = tab === name;
    $(tab).setAttribute("aria-selected", String(here));
    $(tab).tabIndex = here ? 0 : -1;
    $(panel).hidden = !here;
  }
  $(name === "tab-look" ? "look-prompt" : "input").focus();
}

function say(text, bad = false) {
  $("look-status").textContent = text;
  $("look-status").classList.toggle("bad", bad);
}

async function look(event) {
  event.preventDefault();
  const body = { model: model.id, prompt: $("look-prompt").value };
  if ($("look-against").value) body.against = $("look-against").value;
  $("look-send").disabled = true;
  say("Looking … the first text of a model takes some seconds");
  try {
    $("look-page").srcdoc = (await post("v1/look", body)).page;
    $("look-page").hidden = false;
    say("");
  } catch (error) {
    say(`Error: ${error.message}`, true);
  }
  $("look-send").disabled = false;
}

export function start() {
  for (const tab of Object.keys(TABS)) $(tab).addEventListener("click", () => open(tab));
  $("tabs").addEventListener("keydown", (event) => {
    if (!["ArrowLeft", "ArrowRight"].includes(event.key)) return;
    const other = event.target.id === "tab-chat" ? "tab-look" : "tab-chat";
    open(other);
    $(other).focus();
  });
  $("look-ask").addEventListener("submit", look);
}
