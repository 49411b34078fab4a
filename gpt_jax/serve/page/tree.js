// The turns of a conversation are a tree: an edit or another answer begins a branch.
// What is seen is the path from its root to one leaf. A turn knows its parent.

export function path(turns, leaf) {
  const found = [];
  for (let turn = turns.get(leaf); turn; turn = turns.get(turn.parent)) found.unshift(turn);
  return found;
}

// The turns that follow one (null: that begin), the oldest first.
export function after(turns, id) {
  const found = [...turns.values()].filter((turn) => turn.parent === id);
  return found.sort((a, b) => a.made - b.made);
}

// The leaf behind a turn, by the newest branches.
export function newest(turns, id) {
  for (;;) {
    const next = after(turns, id).at(-1);
    if (!next) return id;
    id = next.id;
  }
}

// All turns, each behind its parent.
export function ordered(turns, id = null) {
  return after(turns, id).flatMap((turn) => [turn, ...ordered(turns, turn.id)]);
}
