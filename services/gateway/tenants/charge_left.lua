-- Charge what has been generated for requests whose clients left and may come back, or whose gateway has died, and free
-- the places of those that have ended. A gateway is there as long as its stream is.
-- KEYS: hash of requests that are charged without a client (tenant_hash.lua)
-- ARGV: prefixes of records, of journals, of tenants' hashes and of deltas; where to go on, and how many to look at
-- Returns where to go on, "0" at the end, and (name, tokens)... that are charged now.
-- requires: tenant_hash
local left = KEYS[1]
ensure_hash(left)
local alive = {[''] = false} -- by name; '': of those whose clients have left, none

local function has_gateway(name)
  if alive[name] == nil then alive[name] = redis.call('EXISTS', ARGV[4] .. name) == 1 end
  return alive[name]
end

-- Return whether a gateway takes a request out at its end. It does not know of one if the reply to its admission was lost:
-- then there is no record.
local function is_known(gateway, name, id)
  if not has_gateway(gateway) then return false end
  local open = ARGV[3] .. name .. ':open'
  ensure_hash(open)
  return is_there(ARGV[1] .. id) or age(open, id) <= STALE
end

-- Return how many tokens an answer has beyond those that are charged, and whether it has not ended.
local function progress(id, charged)
  local record, journal = ARGV[1] .. id, ARGV[2] .. id
  if not is_there(record) then return 0, false end
  local written = redis.call('TYPE', journal).ok == 'string' and redis.call('STRLEN', journal) / 4 or 0
  return math.max(0, math.floor(written) - charged), redis.call('HEXISTS', record, 'finish') == 0
end

-- Charge one request, and return the tokens.
local function charge(field, name, id, charged, limit)
  local key = ARGV[3] .. name
  local open = key .. ':open'
  ensure_hash(key)
  ensure_hash(open)
  local more, runs = progress(id, charged)
  if more > 0 then
    begin(key, open, id)
    if limit > 0 then raise_level(key, 'tokens', limit, more) end
    redis.call('HINCRBY', key, 'used:generated', more)
  end
  if runs then
    redis.call('HSET', left, field, string.format('%d:%d', charged + more, limit))
  else
    forget(key, open, id)
    redis.call('HDEL', left, field)
  end
  return more
end

local cursor, found = unpack(redis.call('HSCAN', left, ARGV[5], 'COUNT', ARGV[6]))
local said = {cursor}
for i = 1, #found, 2 do
  local field = found[i]
  local name, id = string.match(field, '^(%S*) (%S+)$')
  -- Not `found[i + 1]`: a scan may tell of one twice.
  local charged, limit, gateway = string.match(redis.call('HGET', left, field) or '', '^(%d+):(%d+):?(.*)$')
  if not id or not charged then
    redis.call('HDEL', left, field)
  elseif not is_known(gateway, name, id) then
    local more = charge(field, name, id, tonumber(charged), tonumber(limit))
    if more > 0 then said[#said + 1], said[#said + 2] = name, more end
  end
end
redis.call('EXPIRE', left, KEPT_S)
return said
