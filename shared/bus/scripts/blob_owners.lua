-- Prelude: who owns which blobs, so that a budget that is short is divided fairly: what goes first is the oldest of
-- whoever has most. So nobody who has no more than an even share loses anything to others.
-- KEYS: index, ...
-- Beside the index are `:owned`, a hash member -> "bytes:owner"; `:owners`, a zset of owners by bytes; and for each owner
-- `:of:OWNER`, a zset of members by last use. `:owned` is the truth: the others may lack or have what they should not.
local OWNED, OWNERS = KEYS[1] .. ':owned', KEYS[1] .. ':owners'

-- Return the bytes and the owner of a blob; nil if it has none.
local function ownership(member)
  return string.match(redis.call('HGET', OWNED, member) or '', '^(%d+):(.*)$')
end

local function disown(member)
  local bytes, owner = ownership(member)
  redis.call('HDEL', OWNED, member)
  if not owner then return end
  redis.call('ZREM', KEYS[1] .. ':of:' .. owner, member)
  if tonumber(redis.call('ZINCRBY', OWNERS, -bytes, owner)) <= 0 then redis.call('ZREM', OWNERS, owner) end
end

local function own(member, owner, bytes, time)
  disown(member)
  redis.call('HSET', OWNED, member, bytes .. ':' .. owner)
  redis.call('ZADD', KEYS[1] .. ':of:' .. owner, time, member)
  redis.call('ZINCRBY', OWNERS, bytes, owner)
end

local function use_owned(member, time)
  local _, owner = ownership(member)
  if owner then redis.call('ZADD', KEYS[1] .. ':of:' .. owner, time, member) end
end

-- Drop what is not an owner's among its blobs, count its bytes anew, and forget an owner without any.
local function recount(owner)
  local key, sum = KEYS[1] .. ':of:' .. owner, 0
  for _, member in ipairs(redis.call('ZRANGE', key, 0, -1)) do
    local bytes, whose = ownership(member)
    if whose == owner then sum = sum + bytes else redis.call('ZREM', key, member) end
  end
  redis.call('ZREM', OWNERS, owner)
  if sum > 0 then redis.call('ZADD', OWNERS, sum, owner) end
end

-- Return the oldest blob of an owner, but for one, or nil; and whether what is kept of the owner was wrong as far as seen.
local function oldest_of(owner, but)
  local members = redis.call('ZRANGE', KEYS[1] .. ':of:' .. owner, 0, 1)
  for _, member in ipairs(members) do
    local _, whose = ownership(member)
    if whose ~= owner then return nil, true end
    if member ~= but then return member, false end
  end
  return nil, #members == 0
end

-- Return the oldest blob, but for one, of the owner with most bytes that has another; nil if none has. It ends: an owner
-- is recounted once and then right or gone, and only one owner has no other blob.
local function oldest_of_most(but)
  local place = 0
  while true do
    local owner = redis.call('ZREVRANGE', OWNERS, place, place)[1]
    if not owner then return end
    local oldest, wrong = oldest_of(owner, but)
    if oldest then return oldest end
    if wrong then recount(owner) else place = place + 1 end
  end
end
