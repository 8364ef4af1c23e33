-- Admit the requests of one HTTP request, or refuse all by the first limit that they would break: of amounts a minute, by
-- GCRA (an allowance is there at once and grows back evenly), or of the requests that are open.
-- KEYS: (hash of a tenant, its open requests)..., hash of requests that are charged without a client
-- ARGV: prefix of records, limits and amounts as JSON (services/gateway/tenants/limiter.py)
-- Returns {limit that refuses or '', number of its tenant from 1, ms until trying again makes sense, then of the first
-- tenant: remaining requests, ms until there are all, remaining tokens, ms until there are all; -1 without a limit}.
-- requires: tenant_hash
local asked = cjson.decode(ARGV[2])
local left = KEYS[#KEYS]
local amounts = {requests = asked.requests, tokens = asked.tokens, media = asked.media}

local function allowance(key, field, limit)
  if not limit then return -1, -1 end
  local level = level_of(key, field, limit)
  return math.max(0, math.floor(limit - level)), math.ceil(level * MINUTE / limit / 1000)
end

-- Forget open requests whose answer has ended although no gateway has said so: theirs has died, or their client left.
-- Count uploads anew: their sum may be wrong beside a gateway of an older build, which does not keep it.
local function sweep(key, open)
  for _, id in ipairs(redis.call('HKEYS', open)) do
    local record = ARGV[1] .. id
    local there = is_there(record)
    if (not there and age(open, id) > STALE) or (there and redis.call('HEXISTS', record, 'finish') == 1) then
      forget(key, open, id)
    elseif there and redis.call('HGET', record, 'epoch') ~= '0' then
      begin(key, open, id)
    end
  end
  recount_uploads(key, open)
end

local function crowded(key, open, limits)
  if #asked.ids == 0 then return end -- it takes no place
  if limits.concurrent and redis.call('HLEN', open) + #asked.ids > limits.concurrent then return 'concurrent' end
  local queued = number(key, 'queued')
  if limits.uploads and asked.media > 0 then
    if redis.call('HEXISTS', key, 'uploads') == 0 then recount_uploads(key, open) end
    local stored = number(key, 'uploads')
    if stored > 0 and stored + asked.media > limits.uploads then return 'uploads' end
  end
  if limits.queued and queued > 0 and queued + asked.queued > limits.queued then return 'queued' end
end

local function refused(key, open, limits)
  for _, field in ipairs({'requests', 'tokens', 'media'}) do
    if limits[field] and amounts[field] > 0 then
      local excess = level_of(key, field, limits[field]) + math.min(amounts[field], limits[field]) - limits[field]
      if excess > 0 then return field, math.ceil(excess * MINUTE / limits[field] / 1000) end
    end
  end
  local limit = crowded(key, open, limits)
  if limit and redis.call('SET', open .. ':swept', '1', 'NX', 'PX', 1000) then
    sweep(key, open)
    limit = crowded(key, open, limits)
  end
  return limit, 1000
end

ensure_hash(left)
local verdict = {'', 0, 0}
for i = 1, #KEYS - 1, 2 do
  ensure_hash(KEYS[i])
  ensure_hash(KEYS[i + 1])
  local limit, wait = refused(KEYS[i], KEYS[i + 1], asked.limits[(i + 1) / 2])
  if limit then
    verdict = {limit, (i + 1) / 2, wait}
    break
  end
end
for i = 1, #KEYS - 1, 2 do
  local key, open, limits = KEYS[i], KEYS[i + 1], asked.limits[(i + 1) / 2]
  redis.call('HSETNX', key, 'since', time[1])
  if verdict[1] ~= '' then
    redis.call('HINCRBY', key, 'used:refused', asked.requests)
  else
    for field, amount in pairs(amounts) do
      if limits[field] and amount > 0 then
        raise_level(key, field, limits[field], amount)
      end
    end
    for n, id in ipairs(asked.ids) do
      local tokens = n == 1 and asked.queued or 0
      redis.call('HSET', open, id, string.format('%d:%.0f', tokens, now))
      count(key, 'queued', tokens)
      if limits.uploads and asked.media > 0 then
        local bytes = math.ceil(asked.media / #asked.ids)
        redis.call('HSET', open .. ':uploads', id, bytes)
        count(key, 'uploads', bytes)
      end
      local name = asked.names[(i + 1) / 2]
      redis.call('HSET', left, name .. ' ' .. id, string.format('0:%d:%s', limits.tokens or 0, asked.gateway))
    end
    redis.call('HINCRBY', key, 'used:requests', asked.requests)
    redis.call('HINCRBY', key, 'used:media', asked.media)
  end
end
redis.call('EXPIRE', left, KEPT_S)
local first = asked.limits[1]
for _, field in ipairs({'requests', 'tokens'}) do
  verdict[#verdict + 1], verdict[#verdict + 2] = allowance(KEYS[1], field, first[field])
end
return verdict
