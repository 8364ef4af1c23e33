-- Prelude of the scripts that count what tenants use. A key of another type is damaged, and begins anew.
-- KEYS: (hash of a tenant, its open requests: id -> "tokens that are queued:time in microseconds")..., hash of requests that
-- are charged without a client: "name id" -> "tokens of its answer that are charged:limit a minute, or 0", and after one
-- more colon the gateway that charges it at its end, if there is one.
-- Beside the open requests is `:uploads`, the bytes that are stored for each; their sum is a field of the tenant's hash.
local MINUTE = 60000000
local STALE = MINUTE -- age at which an open request without a record has ended for certain
local KEPT_S = 86400 -- how long what is charged without a client stays after the last change: then nobody limits any more
local time = redis.call('TIME')
local now = time[1] * 1000000 + time[2]

local function ensure_hash(key)
  local kind = redis.call('TYPE', key).ok
  if kind ~= 'hash' and kind ~= 'none' then redis.call('UNLINK', key) end
end

local function is_there(record)
  return redis.call('TYPE', record).ok == 'hash'
end

-- Return how long ago an open request came; one that is not open came long ago.
local function age(open, id)
  return now - (tonumber(string.match(redis.call('HGET', open, id) or '', ':(%d+)$')) or 0)
end

local function number(key, field)
  return tonumber(redis.call('HGET', key, field) or 0) or 0
end

-- How much of an allowance a minute is used: "amount:time in microseconds", of which time gives back. As an amount, and not
-- as GCRA's time of arrival, it means the same when the limit is another one.
local function level_of(key, field, limit)
  local level, at = string.match(redis.call('HGET', key, field) or '', '^(%d+%.?%d*):(%d+)$')
  return level and math.max(0, level - (now - at) * limit / MINUTE) or 0
end

local function raise_level(key, field, limit, amount)
  local level = math.max(0, level_of(key, field, limit) + amount)
  redis.call('HSET', key, field, string.format('%.3f:%.0f', level, now))
end

-- Change an amount of open requests: `queued`, tokens, or `uploads`, bytes.
local function count(key, field, change)
  if change ~= 0 then
    redis.call('HSET', key, field, string.format('%.0f', math.max(0, number(key, field) + change)))
  end
end

-- Count the bytes anew that are stored for open requests. What an older gateway has ended may still be there.
local function recount_uploads(key, open)
  local uploads, sum = open .. ':uploads', 0
  ensure_hash(uploads)
  for _, id in ipairs(redis.call('HKEYS', uploads)) do
    if redis.call('HEXISTS', open, id) == 1 then
      sum = sum + (tonumber(redis.call('HGET', uploads, id)) or 0)
    else
      redis.call('HDEL', uploads, id)
    end
  end
  redis.call('HSET', key, 'uploads', string.format('%.0f', sum))
end

-- Note that an answer has begun, so that its prompt is queued no more.
local function begin(key, open, id)
  local value = redis.call('HGET', open, id)
  if not value then return end
  local tokens, since = string.match(value, '^(%d+):(%d+)$')
  count(key, 'queued', -(tonumber(tokens or 0)))
  redis.call('HSET', open, id, '0:' .. (since or 0))
end

-- Note that a request has ended.
local function forget(key, open, id)
  local uploads = open .. ':uploads'
  ensure_hash(uploads)
  begin(key, open, id)
  redis.call('HDEL', open, id)
  count(key, 'uploads', -(tonumber(redis.call('HGET', uploads, id) or 0) or 0))
  redis.call('HDEL', uploads, id)
  if redis.call('EXISTS', open) == 0 then
    redis.call('HDEL', key, 'queued', 'uploads')
    redis.call('UNLINK', uploads)
  end
end
