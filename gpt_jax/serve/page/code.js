// Code with its comments, texts, numbers and keywords in colours: enough to read it by,
// for most languages alike. A parser of each would be more exact, and a library.

import { make } from "./dom.js";

const KEYWORDS = new Set((
  "abstract and as assert async await begin bool boolean break case catch char class const "
  + "continue def default defer del delete do done double elif else end enum except export "
  + "extends extern false False fi final finally float fn for foreach from func function go "
  + "goto if impl implements import in instanceof int interface is lambda let local long "
  + "match mod module mut namespace new nil None nonlocal not null or package pass private "
  + "protected pub public raise return self short signed sizeof static string struct super "
  + "switch template then this throw trait true True try type typedef typeof union unsigned "
  + "use using var virtual void where while with yield "
  + "select insert update delete create table into values join group order by limit"
).split(" "));
const STYLES = { // of comments
  "#": "py python python3 pycon sh bash zsh shell console rb ruby yaml yml toml r perl pl "
    + "make makefile dockerfile docker elixir julia jl nim ps1 powershell conf ini",
  "--": "sql lua haskell hs ada elm",
  "//": "",  // all others
};
const COMMENTS = {
  "#": "#[^\\n]*",
  "--": "--[^\\n]*|\\/\\*[^]*?(?:\\*\\/|$)",
  "//": "\\/\\/[^\\n]*|\\/\\*[^]*?(?:\\*\\/|$)",
};
const STRINGS = '"""[^]*?(?:"""|$)|\'\'\'[^]*?(?:\'\'\'|$)'
  + '|"(?:\\\\.|[^"\\\\\\n])*"?|\'(?:\\\\.|[^\'\\\\\\n])*\'?|`(?:\\\\.|[^`\\\\])*`?';

// The code as nodes; of no language as it is.
export function highlighted(code, language) {
  if (!language) return [code];
  const style = Object.keys(STYLES).find((one) =>
    STYLES[one].split(" ").includes(language.toLowerCase())) ?? "//";
  const part = new RegExp(`(?<comment>${COMMENTS[style]})|(?<string>${STRINGS})`
    + "|(?<number>\\b\\d[\\w.]*)|(?<word>[A-Za-z_]\\w*)", "g");
  const found = [];
  let plain = "";
  for (let at = 0, match; at < code.length; at = part.lastIndex) {
    match = part.exec(code);
    plain += code.slice(at, match?.index);
    if (!match) break;
    const kind = kindOf(match.groups);
    if (!kind) { plain += match[0]; continue; }
    found.push(plain, make("span", { className: kind }, match[0]));
    plain = "";
  }
  return [...found, plain];
}

function kindOf({ comment, string, number, word }) {
  if (comment) return "comment";
  if (string) return "string";
  if (number) return "number";
  return KEYWORDS.has(word) || KEYWORDS.has(word.toLowerCase()) && word === word.toUpperCase()
    ? "keyword" : "";
}
