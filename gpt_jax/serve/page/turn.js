// A turn as it is seen: who, the text, what is told of it, what can be done with it.

import { button, copier, grow, make } from "./dom.js";
import { render } from "./markdown.js";
import { settings } from "./settings.js";
import { coloured, reachable } from "./tokens.js";

export class TurnView {
  // `form`: {title, plain: no Markdown, versions: the turns at this place}; `acts` does
  // again(turn), edited(turn, text) and turnTo(turn).
  constructor(turn, form, acts) {
    Object.assign(this, { turn, form, acts, painted: 0, frame: 0 });
    // A turn that is still empty will have tokens; of one that has text they may be unknown.
    this.coloured = settings.tokens && turn.tokens && (turn.tokens.length || !turn.text);
    const { title, versions } = form;
    this.body = make("div");
    this.note = make("small");
    const mine = turn.role === "user";
    this.tools = make("span", { className: "tools" },
      ...(versions.length > 1 ? this.branches(versions) : []),
      copier(() => turn.text),
      button("Edit", () => this.edit(), { className: "change" }),
      ...(mine ? [] : [button("Regenerate", () => acts.again(turn), { className: "again" })]));
    this.foot = make("footer", {}, this.note, this.tools);
    this.box = make("article", { className: `turn ${turn.role}` },
      make("h2", {}, title), this.body, this.foot);
    this.finish();
  }

  // The switch between the versions of this turn.
  branches(versions) {
    const at = versions.indexOf(this.turn);
    const to = (step, text, label) => button(text, () => this.acts.turnTo(versions[at + step]), {
      "aria-label": label, disabled: !versions[at + step], className: step < 0 ? "back" : "on",
    });
    return [
      to(-1, "‹", "Previous version"),
      make("span", { className: "count" }, `${at + 1}/${versions.length}`),
      to(1, "›", "Next version"),
    ];
  }

  // The text has grown: it is painted with the next frame.
  grown() {
    this.frame ||= requestAnimationFrame(() => { this.frame = 0; this.paint(); });
  }

  finish() {
    cancelAnimationFrame(this.frame);
    this.frame = 0;
    this.paint();
    this.note.textContent = this.turn.note;
  }

  paint() {
    const { turn, body, form } = this;
    const write = () => {
      if (this.coloured) {
        for (const token of turn.tokens.slice(this.painted)) {
          if (token[3] ?? token[0]) body.append(coloured(token));
        }
        this.painted = turn.tokens.length;
        body.className = "plain";
        reachable();
      } else if (form.plain) {
        body.append(turn.text.slice(this.painted));
        this.painted = turn.text.length;
        body.className = "plain";
      } else {
        render(body, turn.text);
        body.className = "markdown";
      }
    };
    if (this.box.parentElement) grow(this.box.parentElement, write);
    else write();
  }

  // Puts an editor in the text's place.
  edit() {
    if (this.box.querySelector("form")) return;
    const mine = this.turn.role === "user";
    const input = make("textarea", {
      value: this.turn.text, "aria-label": mine ? "Edited message" : "Edited answer",
      rows: Math.min(12, 2 + this.turn.text.split("\n").length),
    });
    const form = make("form", { className: "edit" }, input, make("span", { className: "row" },
      make("button", { type: "submit", className: "first" }, mine ? "Send" : "Keep"),
      button("Cancel", () => this.stay())));
    form.addEventListener("submit", (event) => {
      event.preventDefault();
      if (mine && !input.value.trim()) return;
      this.acts.edited(this.turn, input.value);
    });
    form.addEventListener("keydown", (event) => {
      if (event.key === "Escape") { this.stay(); event.stopPropagation(); }
      if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) form.requestSubmit();
    });
    this.body.hidden = this.foot.hidden = true;
    this.box.append(form);
    input.focus();
  }

  stay() {
    this.box.querySelector("form").remove();
    this.body.hidden = this.foot.hidden = false;
    this.tools.querySelector(".change").focus();
  }
}
