-- Prelude of the scripts that keep the blobs' index. A member is "kind:key", so the fields `sum` and `pinned` (bytes of
-- all blobs, and of the pinned ones) are never one.
-- KEYS: index, sizes, pins
-- ARGV: prefix of blob keys, bytes of a chunk, ...
-- requires: typed
-- requires: sizes
-- requires: blob_owners
local function count(field, bytes)
  add_size(KEYS[2], field, bytes)
end

local function size_of(member)
  return read_size(KEYS[2], member)
end

local MOST_CHUNKS = 2 ^ 16 -- of a blob: 64 GiB. A size that is damaged must not occupy Redis for ever.

local function delete_blob(member)
  local size = size_of(member)
  for n = 0, math.min(math.max(math.ceil(size / ARGV[2]), 1), MOST_CHUNKS) - 1 do
    redis.call('UNLINK', ARGV[1] .. member .. ':' .. n)
  end
  redis.call('UNLINK', ARGV[1] .. member)
  redis.call('ZREM', KEYS[1], member)
  if redis.call('ZREM', KEYS[3], member) == 1 then count('pinned', -size) end
  disown(member)
  if redis.call('HDEL', KEYS[2], member) == 1 then count('sum', -size) end
end

local function now()
  local time = redis.call('TIME')
  return time[1] * 1000000 + time[2]
end

-- Delete what has expired. Every use renews TTL and the place in the index together, so a blob whose place is older than
-- the TTL has expired; a pinned one has when its time is over.
local function sweep(time, ttl)
  for _, old in ipairs(redis.call('ZRANGEBYSCORE', KEYS[1], '-inf', time - ttl * 1000000)) do delete_blob(old) end
  for _, old in ipairs(redis.call('ZRANGEBYSCORE', KEYS[3], '-inf', time)) do delete_blob(old) end
end

-- Return the blob that makes room, but for the one of this name: the least recently used of all if it has no owner, else
-- that of whoever owns most. nil if there is no other.
local function next_to_go(but)
  local first, second = unpack(redis.call('ZRANGE', KEYS[1], 0, 1))
  local oldest = first
  if first == but then oldest = second end
  if oldest and not ownership(oldest) then return oldest end
  return oldest_of_most(but) or oldest
end

-- Evict blobs beyond the budget, but for the one of this name. It ends: each that goes is in the index or is owned.
local function evict(budget, member)
  while size_of('sum') > budget do
    local going = next_to_go(member)
    if not going then return end
    delete_blob(going)
  end
end
