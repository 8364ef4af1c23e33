// Conversations in the browser's IndexedDB: chats {id, title, created, updated, head}, and turns {id, chat, parent, role,
// ...} with their files as blobs. Where the browser has no IndexedDB for us, they last as long as the page.

const NAME = "millrace", CHATS = "chats", TURNS = "turns";

let database = null;
export let isLasting = true;

const done = (request) => new Promise((resolve, reject) => {
  request.onsuccess = () => resolve(request.result);
  request.onerror = () => reject(request.error);
});

export async function openStore() {
  try {
    const request = indexedDB.open(NAME, 1);
    request.onupgradeneeded = () => {
      request.result.createObjectStore(CHATS, { keyPath: "id" });
      request.result.createObjectStore(TURNS, { keyPath: "id" }).createIndex("chat", "chat");
    };
    database = await done(request);
    database.onversionchange = () => database.close();
  } catch {
    isLasting = false;
  }
}

/** Runs `use` on stores, and resolves to what its request does once all of it is written. */
async function transact(stores, mode, use) {
  if (!database) return undefined;
  const transaction = database.transaction(stores, mode);
  const ended = new Promise((resolve, reject) => {
    transaction.oncomplete = resolve;
    transaction.onabort = () => reject(transaction.error);
  });
  const request = use(...stores.map((name) => transaction.objectStore(name)));
  await ended;
  return request?.result;
}

export async function readChats() {
  const chats = await transact([CHATS], "readonly", (store) => store.getAll());
  return (chats ?? []).sort((a, b) => b.updated - a.updated);
}

export async function readTurns(chat) {
  const turns = await transact([TURNS], "readonly", (store) => store.index("chat").getAll(chat));
  return (turns ?? []).sort((a, b) => a.at - b.at);
}

/** Writes a chat, and turns of it. */
export function write(chat, turns = []) {
  return transact([CHATS, TURNS], "readwrite", (chats, store) => {
    chats.put(chat);
    for (const turn of turns) store.put(turn);
  });
}

/** Writes what has changed of a turn, unless it was deleted. */
export function update(turn) {
  return transact([TURNS], "readwrite", (store) => {
    store.getKey(turn.id).onsuccess = ({ target }) => { if (target.result) store.put(turn); };
  });
}

export function remove(chat) {
  return transact([CHATS, TURNS], "readwrite", (chats, turns) => {
    chats.delete(chat);
    turns.index("chat").getAllKeys(chat).onsuccess = ({ target }) => target.result.forEach((key) => turns.delete(key));
  });
}

export function removeAll() {
  return transact([CHATS, TURNS], "readwrite", (chats, turns) => {
    chats.clear();
    turns.clear();
  });
}
