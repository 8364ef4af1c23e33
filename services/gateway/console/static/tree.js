// A conversation as a tree: every turn names its parent, and what is shown is the path from the first turn to one head.
// An edited message and a repeated answer are siblings of the first one. Pure: turns are a Map by id, in the order made.

/** The turns from the first to `head`. */
export function path(turns, head) {
  const found = [];
  for (let turn = turns.get(head); turn; turn = turns.get(turn.parent)) found.unshift(turn);
  return found;
}

/** The turns that stand at the same place, itself included, the oldest first. */
export function siblings(turns, turn) {
  return [...turns.values()].filter((other) => other.parent === turn.parent);
}

/** The newest end of the conversation behind a turn. */
export function tip(turns, id) {
  for (;;) {
    const next = [...turns.values()].findLast((turn) => turn.parent === id);
    if (!next) return id;
    id = next.id;
  }
}
