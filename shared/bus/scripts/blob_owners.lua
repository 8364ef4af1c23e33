-- Prelude: who owns which blobs, so that a budget that is short is divided fairly: what goes first is the oldest of
-- whoever has most. So nobody who has no more than an even share loses anything to others.
-- KEYS: index, ...
-- Beside the index are `:owned`, a hash member -> "bytes:owner"; `:owners`, a zset of owners by bytes; and for each owner
-- `:of:OWNER`, a zset of members by last use.
local OWNED, OWNERS = KEYS[1] .. ':owned', KEYS[1] .. ':owners'

local function disown(member)
  local bytes, owner = string.match(redis.call('HGET', OWNED, member) or '', '^(%d+):(.*)$')
  if not bytes then return end
  redis.call('HDEL', OWNED, member)
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
  local owner = string.match(redis.call('HGET', OWNED, member) or '', '^%d+:(.*)$')
  if owner then redis.call('ZADD', KEYS[1] .. ':of:' .. owner, time, member) end
end

-- Return the oldest blob, but for one, of the owner with most bytes; nil if no blob has an owner, or it has only this one.
local function oldest_of_most(but)
  local owner = redis.call('ZREVRANGE', OWNERS, 0, 0)[1]
  if not owner then return end
  for _, member in ipairs(redis.call('ZRANGE', KEYS[1] .. ':of:' .. owner, 0, 1)) do
    if member ~= but then return member end
  end
end
