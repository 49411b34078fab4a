// The tab that looks inside: asks for the page of the microscope and shows it in a frame
// of its own, which reaches nothing of this page.
"use strict";

const TABS = { "tab-chat": "talk", "tab-look": "look" };

function openTab(name) {
  for (const [tab, panel] of Object.entries(TABS)) {
    const open = tab === name;
    $(tab).setAttribute("aria-selected", String(open));
    $(tab).tabIndex = open ? 0 : -1;
    $(panel).hidden = !open;
  }
  $(name === "tab-look" ? "look-prompt" : "input").focus();
}

function lookSays(text, bad = false) {
  $("look-status").textContent = text;
  $("look-status").classList.toggle("bad", bad);
}

async function lookAt(event) {
  event.preventDefault();
  const body = { model: state.model, prompt: $("look-prompt").value };
  if ($("look-against").value) body.against = $("look-against").value;
  $("look-send").disabled = true;
  lookSays("Looking … the first text of a model takes some seconds");
  try {
    const response = await fetch("v1/look", {
      method: "POST", headers: headers(), body: JSON.stringify(body),
    });
    if (!response.ok) throw await complaint(response);
    $("look-page").srcdoc = (await response.json()).page;
    $("look-page").hidden = false;
    lookSays("");
  } catch (error) {
    lookSays(`Error: ${error.message}`, true);
  }
  $("look-send").disabled = false;
}

// The tabs are there when the chosen model can be looked into.
function offerLook() {
  const offered = Boolean(model()?.look);
  $("tabs").hidden = !offered;
  if (!offered && !$("look").hidden) openTab("tab-chat");
}

for (const tab of Object.keys(TABS)) $(tab).addEventListener("click", () => openTab(tab));
$("tabs").addEventListener("keydown", (event) => {
  if (!["ArrowLeft", "ArrowRight"].includes(event.key)) return;
  const other = event.target.id === "tab-chat" ? "tab-look" : "tab-chat";
  openTab(other);
  $(other).focus();
});
$("look-ask").addEventListener("submit", lookAt);
