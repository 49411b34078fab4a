// Elements, found and made. Texts are only ever set as text, never as markup.

export const $ = (id) => document.getElementById(id);

// A new element: what is given are its properties, or else its attributes.
export function make(tag, given = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(given)) {
    if (name in made) made[name] = value;
    else made.setAttribute(name, value);
  }
  made.append(...children);
  return made;
}

export function button(text, act, given = {}) {
  return make("button", { type: "button", onclick: act, ...given }, text);
}

// Changes what is in a box that scrolls; whoever was at its end stays there.
export function grow(box, change) {
  const atEnd = box.scrollHeight - box.scrollTop - box.clientHeight < 80;
  change();
  if (atEnd) box.scrollTop = box.scrollHeight;
}

// A button that copies what `text` returns when it is pressed.
export function copier(text, given) {
  const made = button("Copy", async () => {
    made.textContent = await copied(text()) ? "Copied" : "Not allowed";
    setTimeout(() => { made.textContent = "Copy"; }, 1500);
  }, given);
  return made;
}

async function copied(text) {
  try {
    await navigator.clipboard.writeText(text); // is there on https and localhost alone
    return true;
  } catch {
    const box = make("textarea", { value: text, className: "hidden" });
    document.body.append(box);
    box.select();
    const done = document.execCommand("copy");
    box.remove();
    return done;
  }
}
